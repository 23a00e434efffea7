"""A change of priority after submission: it counts from the next decision on, wherever the request stands."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qllm.scheduler import Limits, Policy, PolicyError, Request, RequestTooLarge, Scheduler, State, make_policy
from tests.scheduler.test_scheduler import add, check, drive
from tests.scheduler.test_tight_memory import check_order
from tests.worlds import limits, policies


@settings(max_examples=150, deadline=None)
@given(st.data(), policies, limits())
def test_a_waiting_request_is_served_as_if_it_had_come_with_its_new_priority(data, policy, limits):
    """I5, I7: no decision knows what the priority was before. Fairness does: a tenant's turn at a level is taken."""
    assume(getattr(policy, "order_name", None) != "fair")
    n = data.draw(st.integers(1, 8))
    sizes = [(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))) for _ in range(n)]
    first, then = ([data.draw(st.integers(0, 2)) for _ in range(n)] for _ in range(2))
    served = []
    for given_first in (first, then):
        s = Scheduler(policy, limits)
        for i, (prompt, output) in enumerate(sizes):
            add(s, i, prompt, output, given_first[i], float(i))
        for i in data.draw(st.permutations(range(n))):
            s.reprioritize(i, then[i], 9.0)
            check(s)
        served.append([([(c.request.id, *c[1:]) for c in p.prefill], p.n_decode) for p in drive(s, 9.0)])
        assert s.kv.free == s.kv.total
    assert served[0] == served[1]


@settings(max_examples=150, deadline=None)
@given(st.data(), policies, limits())
def test_whenever_priorities_change_everybody_is_served_and_the_most_urgent_decode(data, policy, limits):
    """I1, I4, I6, and `check_order`: nobody sits idle while somebody less urgent decodes."""
    s = Scheduler(policy, limits)
    for i in range(data.draw(st.integers(1, 8))):
        add(s, i, data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8)), data.draw(st.integers(0, 2)))
    now, passes = 0.0, 0
    while (p := s.next(now)) is not None:
        passes += 1
        assert passes < 2_000, "somebody is not served"
        check_order(s, p)
        for _ in range(data.draw(st.integers(0, 2)) if passes < 30 else 0):
            with suppress(RequestTooLarge):
                s.reprioritize(data.draw(st.sampled_from(sorted(s.requests))), data.draw(st.integers(0, 2)), now)
            check(s)
        now += 1.0
        if p.preemptions < 2 and s.should_yield(p, now - 0.5):
            s.suspended(p, now - 0.5)
        else:
            s.finished(p, now)
    assert not s.requests
    assert s.kv.free == s.kv.total


def test_a_waiting_request_overtakes_and_falls_back():
    s = Scheduler(make_policy("priority"), Limits(max_seqs=1))
    for i in range(3):
        add(s, i, 5, 1, 1, i)
    s.reprioritize(2, 0, 3.0)
    s.reprioritize(0, 2, 3.0)
    assert [p.prefill[0].request.id for p in drive(s, 3.0)] == [2, 1, 0]


def test_a_suspended_pass_whose_request_became_urgent_goes_on_first():
    s = Scheduler(make_policy("qllm", fill_tokens=0), Limits())
    add(s, 0, 100, 3, 1)
    be = s.next(0.0)
    add(s, 1, 50, 1, 0, 0.1)
    assert s.should_yield(be, 0.1)
    s.suspended(be, 0.1)
    s.reprioritize(0, 0, 0.2)
    assert (be.level, be.prefill_level) == (0, 0)
    assert s.next(0.2) is be
    assert not s.should_yield(be, 0.3), "equals do not preempt each other"


def test_a_running_pass_gives_way_once_its_request_is_best_effort():
    s = Scheduler(make_policy("qllm", fill_tokens=0), Limits())
    add(s, 0, 100, 3, 0)
    p = s.next(0.0)
    add(s, 1, 5, 1, 0, 0.1)
    assert not s.should_yield(p, 0.1)
    s.reprioritize(0, 1, 0.2)
    assert s.should_yield(p, 0.2)


def test_who_became_urgent_takes_a_place_in_the_batch():
    s = Scheduler(make_policy("priority"), Limits(max_seqs=1))
    for i, priority in enumerate((2, 1, 0)):  # each takes the one place from the one before
        add(s, i, 5, 9, priority, i)
        s.finished(s.next(i), i + 0.5)

    def decoding(now: float) -> list[int]:
        return [*s.next(now).decode.members]

    s.reprioritize(0, -1, 3.0)
    assert decoding(3.0) == [0]
    s.reprioritize(0, 5, 3.1)  # while its pass runs: from the next on
    check(s)
    assert s.running.level == 5
    s.finished(s.running, 4.0)
    assert decoding(4.0) == [2]
    s.finished(s.running, 5.0)
    s.reprioritize(2, 9, 5.0)
    s.reprioritize(2, 3, 5.0)
    check(s)
    assert decoding(5.0) == [1]


def test_a_request_in_host_memory_comes_back_by_its_new_priority():
    s = Scheduler(make_policy("qllm", fill_tokens=0), Limits(kv_blocks=8, block_size=4, evict="offload"))
    be = [add(s, i, 11, 5, 2) for i in range(2)]
    s.finished(s.next(0.0), 1.0)
    ls = add(s, 2, 28, 1, 0, 1.0)
    p = s.next(1.0)
    assert [r.state for r in (*be, ls)] == [State.OFFLOADED, State.OFFLOADED, State.IN_PASS]
    s.reprioritize(1, 1, 1.5)
    check(s)
    s.finished(p, 2.0)
    assert s.next(2.0).restored[0] is be[1]


def test_a_priority_with_which_it_could_never_fit_is_refused():
    s = Scheduler(make_policy("qllm"), Limits(kv_blocks=10, block_size=4, urgent_blocks=4))
    r = add(s, 0, 36, 2, 0)
    with pytest.raises(RequestTooLarge, match="take 10 KV blocks of 4 tokens; its class may use 6"):
        s.reprioritize(0, 1, 0.5)
    assert (r.priority, r.level) == (0, 0)
    check(s)
    assert len(drive(s)) == 2


def test_who_is_unknown_or_aborted_is_left_alone():
    s = Scheduler(make_policy("qllm"), Limits())
    add(s, 0, 5, 2, 0)
    s.reprioritize(7, 1, 0.0)
    p = s.next(0.0)
    s.abort(0, 0.1)
    s.reprioritize(0, 1, 0.2)
    assert p.level == 0


def test_an_order_that_does_not_compare_leaves_the_request_where_it_was():
    class Mixed(Policy):
        def order(self, r: Request) -> tuple:
            return (r.arrival if r.priority < 5 else "last",)

        def level(self, r: Request) -> int:
            return 0

    s = Scheduler(Mixed(), Limits(max_seqs=1))
    for i in range(3):
        add(s, i, 5, 1, 1, i)
    with pytest.raises(PolicyError, match=r"order gave \('last',\); comparing it"):
        s.reprioritize(0, 5, 3.0)
    assert s.requests[0].priority == 1
    check(s)
    assert [p.prefill[0].request.id for p in drive(s, 3.0)] == [0, 1, 2]


def test_an_order_that_does_not_compare_is_found_before_a_running_request_is_queued_by_it():
    class Mixed(Policy):
        def order(self, r: Request) -> tuple:
            return (r.arrival if r.priority == 1 else "first",)

    s = Scheduler(Mixed(), Limits())
    add(s, 0, 5, 3, 1)
    s.next(0.0)
    with pytest.raises(PolicyError, match=r"order gave \('first',\); comparing it"):
        s.reprioritize(0, 0, 0.5)
    assert s.requests[0].priority == 1
    check(s)
