"""Three and more levels, few KV blocks, both ways of evicting: everybody is served, and in order of urgency."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qllm.scheduler import Limits, Pass, Policy, Request, Scheduler, make_policy
from tests.worlds import policies

#: (prompt tokens, output tokens, priority, arrival)
Spec = tuple[int, int, int, int]

specs = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(-1, 3), st.integers(0, 12)), min_size=1, max_size=9
)
tight = st.builds(
    Limits,
    max_seqs=st.integers(1, 3),
    max_batched_tokens=st.sampled_from([3, 8, 64]),
    kv_blocks=st.integers(12, 20),
    block_size=st.just(1),
    evict=st.sampled_from(["recompute", "offload"]),
    max_resident=st.sampled_from([None, None, 1, 2, 4]),
)


def serve(policy: Policy, limits: Limits, requests: list[Spec], most: int = 2_000) -> list[Pass]:
    """Serve `requests` with one pass per unit of time, and check each decision."""
    s = Scheduler(policy, limits)
    coming = sorted(enumerate(requests), key=lambda item: item[1][3])
    now, passes = 0.0, []
    while coming or s.requests:
        assert len(passes) < most, "somebody is not served"
        while coming and coming[0][1][3] <= now:
            id, (prompt, output, priority, arrival) = coming.pop(0)
            s.add(Request(id, prompt, output, priority, float(arrival)), now)
        p = s.next(now)
        if p is None:
            assert not s.requests, f"I6: idle at {now} with {list(s.requests.values())}"
            now += 1.0
            continue
        passes.append(p)
        check_order(s, p)
        check_residents(s)
        now += 1.0
        if p.preemptions < 3 and s.should_yield(p, now - 0.5):  # a pass gets on between two points, and ends
            s.suspended(p, now - 0.5)
        else:
            s.finished(p, now)
    assert s.kv.free == s.kv.total
    return passes


def check_order(s: Scheduler, p: Pass) -> None:
    """Nobody sits idle, its KV in place, while somebody less urgent decodes in `p`, launched just now."""
    if not p.n_decode or p.running_s:
        return
    decoding = max(r.level for r in p.decode.members.values())
    assert all(idle.level >= decoding for idle in s.ready), f"{list(s.ready)} sit idle while level {decoding} decodes"


def check_residents(s: Scheduler) -> None:
    """No more requests hold KV blocks than may."""
    holding = sum(r.blocks > 0 or r.batch is not None for r in s.requests.values())
    assert s.memory.resident == holding <= (s.limits.max_resident or holding)


@settings(max_examples=300, deadline=None)
@example(make_policy("priority"), Limits(max_seqs=1, max_batched_tokens=64, kv_blocks=12, block_size=1), [(1, 2, 0, 0)])
@given(policies, tight, specs)
def test_everybody_is_served_and_the_urgent_do_not_sit_idle(policy, limits, requests):
    serve(policy, limits, requests)


def test_who_comes_home_from_host_memory_does_not_take_the_place_of_somebody_more_urgent():
    limits = Limits(max_seqs=1, max_batched_tokens=64, kv_blocks=6, block_size=1, evict="offload")
    serve(make_policy("priority"), limits, [(1, 6, 2, 0), (1, 2, 1, 3), (1, 3, 0, 4)])
    limits = Limits(max_seqs=2, kv_blocks=15, block_size=1, evict="offload")
    serve(make_policy("qllm"), limits, [(3, 2, 1, 1), (4, 7, 0, 1), (2, 5, 0, 2), (1, 6, 0, 2)])


def test_a_pass_that_is_due_goes_on_though_somebody_more_urgent_is_suspended_too():
    """I8 with three levels: the pass that has waited longest beyond the bound goes first."""
    s = Scheduler(make_policy("qllm", fill_tokens=0, max_suspended_s=1.0), Limits())
    stopped = []
    for id, (prompt, priority, at) in enumerate([(8000, 1, 0.0), (8000, 0, 0.1), (50, -1, 0.2)]):
        if s.running is not None:
            p = s.running
            s.add(Request(id, prompt, 1, priority, at), at)
            assert s.should_yield(p, at)
            s.suspended(p, at)
            stopped.append(p)
        else:
            s.add(Request(id, prompt, 1, priority, at), at)
        p = s.next(at)
        assert p is not None
        assert p.prefill[0].request.id == id
    s.finished(p, 2.0)
    assert s.next(2.0) is stopped[0]
    assert stopped[0].suspended_s == pytest.approx(1.9)
    assert not s.should_yield(stopped[0], 3.0)
    s.finished(stopped[0], 9.0)
    assert s.next(9.0) is stopped[1]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["qllm", "layer", "hybrid"]), st.sampled_from([0.0, 1.0, 4.0]), tight, specs)
def test_suspension_is_bounded_by_the_bound_and_by_who_was_due_before(name, bound, limits, requests):
    """I8: once a pass is due, nothing runs before it but the pass that ran then and those that were due before it."""
    policy = make_policy(name, max_suspended_s=bound)
    s = Scheduler(policy, limits)
    coming = sorted(enumerate(requests), key=lambda item: item[1][3])
    now, n = 0.0, 0
    while coming or s.requests:
        while coming and coming[0][1][3] <= now:
            id, (prompt, output, priority, arrival) = coming.pop(0)
            s.add(Request(id, prompt, output, priority, float(arrival)), now)
        due = [p for p in s.suspended_passes if p.suspended_for(now) >= bound]
        longest = max((p.suspended_for(now) for p in due), default=0.0)
        p = s.next(now)
        if p is None:
            now += 1.0
            continue
        if due:
            assert p in due
            assert p.suspended_s == longest
        n += 1
        assert n < 2_000
        now += 0.5
        while coming and coming[0][1][3] <= now:
            id, (prompt, output, priority, arrival) = coming.pop(0)
            s.add(Request(id, prompt, output, priority, float(arrival)), now)
        if p.preemptions < 3 and s.should_yield(p, now):
            s.suspended(p, now)
        else:
            s.finished(p, now + 0.5)
            now += 0.5


def test_no_queue_is_kept_for_a_priority_at_which_nobody_waits():
    s = Scheduler(make_policy("priority"), Limits())
    for id in range(1_000):
        s.add(Request(id, 1, 1, id - 500), 0.0)
    assert s.waiting.levels() == [*range(-500, 500)]
    now = 0.0
    while (p := s.next(now)) is not None:
        now += 1.0
        s.finished(p, now)
        assert len(s.waiting._heaps) == len(s.waiting)
    assert not s.waiting._heaps
    assert not s.memory._admitted


def bounded(most: int | None, **more: Any) -> Scheduler:
    return Scheduler(make_policy("priority"), Limits(max_seqs=2, block_size=4, max_resident=most, **more))


def begun(s: Scheduler, r: Request, now: float) -> Pass:
    """The pass that begins when `r` has come."""
    s.add(r, now)
    p = s.next(now)
    assert p is not None
    return p


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_at_the_bound_who_is_more_urgent_takes_the_place_of_the_least_urgent_admitted_last(evict):
    s = bounded(2, evict=evict)
    first, second, urgent = (Request(i, 8, 9, priority) for i, priority in enumerate((1, 1, 0)))
    s.finished(begun(s, first, 0.0), 1.0)
    s.finished(begun(s, second, 1.0), 2.0)
    while second.batch is None:
        s.finished(s.next(2.0), 2.0)
    assert s.memory.resident == 2
    p = begun(s, urgent, 3.0)
    assert [c.request for c in p.prefill] == [urgent]
    assert (first.evictions, second.evictions, s.memory.resident) == (0, 1, 2)
    s.finished(p, 4.0)
    while s.requests:
        p = s.next(5.0)
        assert s.memory.resident <= 2
        s.finished(p, 5.0)
    assert s.memory.resident == 0


def test_at_the_bound_an_equal_waits_and_so_does_who_finds_all_others_in_suspended_passes():
    s = Scheduler(make_policy("qllm", fill_tokens=0), Limits(max_seqs=2, block_size=4, max_resident=1))
    be = begun(s, Request(0, 4000, 2, 1), 0.0)
    s.add(Request(1, 8, 2, 1), 0.1)
    s.add(Request(2, 8, 2, 0), 0.1)
    assert not s.has_slot(0)
    assert not s.has_slot(1)
    assert not s.should_yield(be, 0.1)
    s.finished(be, 1.0)
    assert s.has_slot(0)
    assert not s.has_slot(1)
    assert [c.request.id for c in s.next(1.0).prefill] == [2]


def test_without_a_bound_as_many_hold_memory_as_the_levels_let_in():
    s = Scheduler(make_policy("priority"), Limits(max_seqs=1, block_size=4))
    for number in range(5):
        s.finished(begun(s, Request(number, 4, 50, -number), float(number)), number + 0.5)
    assert s.memory.resident == 5
