"""No class is inverted at a decision, and few passes are suspended, under every policy that ships."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.scheduler import POLICIES, Limits, Pass, Policy, Request, Scheduler, State, make_policy
from tests.scheduler.device import play
from tests.scheduler.test_tight_memory import Spec, specs, tight
from tests.worlds import limits, policies


def requests(given: list[Spec]) -> list[Request]:
    return [Request(i, prompt, output, priority, float(at)) for i, (prompt, output, priority, at) in enumerate(given)]


class Watched(Scheduler):
    """Checks each decision."""

    def next(self, now: float) -> Pass | None:
        """I7, and what the policies promise to the urgent beyond it."""
        evicted = {r.id: r.evictions for r in self.requests.values()}
        level = self.waiting.level()
        could = self.can_prefill(level) and level <= self.policy.urgent
        full = self.ready.count(self.policy.urgent) >= self.limits.max_seqs
        due = self.suspended_passes and (
            max(p.suspended_for(now) for p in self.suspended_passes) >= self.policy.max_suspended_s
        )
        p = super().next(now)
        if p is None:
            return None
        waiting = [r.level for r in self.waiting if r.evictions == evicted.get(r.id, r.evictions)]
        new = [c.request.level for c in p.prefill if not c.context] if not p.preemptions else []
        assert max(new, default=-inf) <= min(waiting, default=inf), f"{p} goes before {waiting}"
        if could and not full and not due and prompt_to_ls(self.policy):
            assert p.prefill_level <= level, f"{p} goes before an LS prefill of level {level}"
        return p

    def suspended(self, p: Pass, now: float) -> bool:
        """How many passes wait, and with how many tokens."""
        kept = super().suspended(p, now)
        most = self.limits.max_suspended_tokens
        assert most is None or sum(q.tokens for q in self.suspended_passes) <= most
        if type(self.policy).__module__ != "tests.worlds":  # which stacks passes as a test
            urgent = {r.level for r in self.requests.values() if r.level <= self.policy.urgent}
            assert len(self.suspended_passes) <= len(urgent) + 1, self.suspended_passes
        return kept


def prompt_to_ls(policy: Policy) -> bool:
    """Whether an LS prefill that could be launched never waits for a decision. (slack: BE may be owed time.)"""
    return type(policy).__name__ in ("Priority", "Qllm", "Layer", "Hybrid")


@settings(max_examples=300, deadline=None)
@given(policies, tight, specs)
def test_no_prefill_goes_before_a_more_urgent_one_where_memory_is_short(policy, limits, given):
    play(Watched(policy, limits), requests(given))


@settings(max_examples=300, deadline=None)
@given(policies, limits(), specs, st.sampled_from([0.1, 1.0, 3.0]))
def test_no_prefill_goes_before_a_more_urgent_one(policy, limits, given, pace):
    play(Watched(policy, limits, lambda chunks, n, context: 1.0), requests(given), lambda p: pace * p.tokens)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("waiting", [1, 5])
def test_of_those_that_wait_the_most_urgent_are_prefilled(name, waiting):
    """The same at one glance: all wait from the start, in the wrong order."""
    s = Watched(make_policy(name), Limits(max_seqs=2, max_batched_tokens=40))
    asked = [Request(i, 20, 2, 5 - i // waiting, 0.0) for i in range(6 * waiting)]
    play(s, asked)
    first = sorted(asked, key=lambda r: (r.first_launch, r.level))
    levels = [r.level for r in first]
    assert levels == sorted(levels)
    assert (len({*levels}) == 1) == (name == "fcfs")  # which does not look at them


def test_a_bound_on_suspended_tokens_is_kept_where_a_policy_would_stack_them():
    class Stack(Policy):
        granularity = "expert"

        def preempts(self, s, running, now):
            return s.can_prefill(s.waiting.level())

    for bound, most in ((None, 5), (25, 2)):
        s = Scheduler(Stack(), Limits(max_suspended_tokens=bound))
        for i in range(6):
            s.add(Request(i, 10, 1, 0, float(i)), float(i))
            if s.running is not None and s.should_yield(s.running, float(i)):
                s.suspended(s.running, float(i))
            if s.running is None:
                s.next(float(i))
        assert len(s.suspended_passes) == most
    assert s.requests[5].state is State.WAITING
