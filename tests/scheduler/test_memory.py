"""KV blocks: limits that make no sense, a budget that is kept, and requests that go to host memory."""

from __future__ import annotations

import pytest

from qllm.scheduler import Limits, Request, Scheduler, SchedulerError, State, make_policy
from qllm.scheduler.memory import KVBudget


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_seqs": 0}, "limits.max_seqs is 0, must be a whole number, at least 1"),
        ({"kv_blocks": 0}, "limits.kv_blocks is 0, must be a whole number, at least 1"),
        ({"block_size": 1.5}, "limits.block_size is 1.5, must be a whole number, at least 1"),
        ({"max_batched_tokens": None}, "limits.max_batched_tokens is None, must be a whole number, at least 1"),
        ({"urgent_blocks": -1}, "limits.urgent_blocks is -1, must be a whole number, at least 0"),
        ({"max_suspended_tokens": True}, "limits.max_suspended_tokens is True, must be a whole number, at least 1"),
        ({"max_resident": 0}, "limits.max_resident is 0, must be a whole number, at least 1"),
        ({"max_seqs": 8, "max_batched_tokens": 4}, r"max_batched_tokens is 4, must be at least max_seqs \(8\)"),
        ({"kv_blocks": 8, "urgent_blocks": 8}, r"limits.urgent_blocks is 8, must be in \[0, 8\)"),
        ({"evict": "drop"}, "limits.evict is 'drop', must be recompute or offload"),
    ],
)
def test_limits_are_checked(wrong, says):
    with pytest.raises(SchedulerError, match=says):
        Limits(**wrong)


def test_without_a_number_of_kv_blocks_a_scheduler_has_no_bound():
    s = Scheduler(make_policy("fcfs"), Limits(max_batched_tokens=100_000))
    s.add(Request(0, 10_000_000, 1, 1, 0.0), 0.0)
    assert s.next(0.0).tokens == 100_000
    assert s.kv.free == s.kv.total - 625_000


def test_no_block_is_taken_or_given_that_is_not_there():
    """I4."""
    kv = KVBudget(total=4, block_size=16, reserve=1, urgent=0)
    kv.take(3)
    with pytest.raises(SchedulerError, match="2 KV blocks asked for, 1 free"):
        kv.take(2)
    with pytest.raises(SchedulerError, match="4 KV blocks given back, but only 3 were taken"):
        kv.give(4)
    assert (kv.room(0), kv.room(1), kv.capacity(0), kv.capacity(1)) == (1, 0, 4, 3)
    kv.give(2)
    kv.take(1)
    assert (kv.free, kv.least_free, kv.peak) == (2, 1, 0.75)


def evicted_before_a_launch() -> tuple[Scheduler, Request]:
    """An LS request whose next token finds no block: a suspended BE prefill, which goes on, has them all."""
    policy = make_policy("qllm", fill_tokens=0, resume="idle")
    s = Scheduler(policy, Limits(kv_blocks=10, block_size=4, evict="offload"))
    s.add(Request(0, 32, 1, 1, 0.0), 0.0)
    be = s.next(0.0)
    ls = Request(1, 8, 3, 0, 1.0)
    s.add(ls, 1.0)
    assert s.should_yield(be, 1.0)
    s.suspended(be, 1.0)
    s.finished(s.next(1.0), 2.0)
    assert s.next(2.0) is be
    assert ls.state is State.OFFLOADED
    assert ls.evictions == 1
    s.finished(be, 3.0)
    return s, ls


def test_kv_that_comes_back_before_anything_is_launched_never_moves():
    s, ls = evicted_before_a_launch()
    p = s.next(3.0)
    assert list(p.decode.members) == [ls.id]
    assert (p.offloaded, p.restored, p.moved_tokens) == (None, None, 0)


def test_a_request_in_host_memory_is_aborted_there():
    s, ls = evicted_before_a_launch()
    assert s.abort(ls.id, 3.0) is None
    assert ls.state is State.ABORTED
    assert s.kv.free == s.kv.total
    s.add(Request(2, 8, 1), 4.0)
    p = s.next(4.0)
    assert p.offloaded is None, "nothing of it is left to be moved"


def test_a_request_whose_kv_has_been_moved_is_aborted():
    s = Scheduler(make_policy("qllm", fill_tokens=0), Limits(kv_blocks=10, block_size=4, evict="offload"))
    be = Request(0, 32, 4, 1)
    s.add(be, 0.0)
    s.finished(s.next(0.0), 1.0)
    s.add(Request(1, 16, 1, 0, 1.0), 1.0)
    p = s.next(1.0)
    assert p.offloaded == [be]
    assert p.moved_tokens == 32
    s.abort(be.id, 1.0)
    assert not s.memory.offloaded
    s.finished(p, 2.0)
    assert s.kv.free == s.kv.total
