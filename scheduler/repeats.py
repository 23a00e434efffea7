"""Decode passes that follow each other without a decision between them.

While nobody comes, ends or is evicted, a steady policy (`Policy.steady`) decides after each decode pass as before it,
and others may know for how long they will (`Policy.alike`). A simulation need not ask then: it counts how many passes
are sure to be alike (`repeats`), and lets the pass stand for the last of them (`repeat`). What is left then is what
asking each time would have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from qllm.scheduler.pass_times import LAST, PassTimes
from qllm.scheduler.passes import NEVER, Pass
from qllm.scheduler.policy import GoesOn, ask

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler


def repeats(s: Scheduler, p: Pass) -> int:
    """How often `p`, which begins, may be followed by a pass of the same requests before anything is to be decided.

    That is: as long as nobody comes. Free KV blocks can only become fewer meanwhile, and those who wait or sit in host
    memory did not get theirs while there were more. With a prefix cache, somebody who was evicted for `p` may need
    fewer than it had, and what somebody who waits has found there stays for as long as the passes are alike.
    """
    batch = p.decode
    if batch is None or p.prefill or p.preemptions or p.restored or p.offloaded:
        return 0
    if s.suspended_passes and s.policy.max_suspended_s < NEVER:
        return 0
    prefixes, found = s.memory.prefixes, 0
    if (prefixes.holders or prefixes.idle) and s.waiting.level() < NEVER:
        if any(map(partial(_may_come_back, s), s.waiting.levels())):
            return 0
        found = prefixes.idle_blocks
    return batch.repeats(s.kv.free - found)


def _may_come_back(s: Scheduler, level: float) -> bool:
    """Whether the first that waits at `level`, and holds no blocks, could be admitted beside the pass that begins."""
    r = s.waiting.peek(level)
    if r is None or r.blocks or not (r.evictions > 0 or s.has_slot(level)):
        return False
    return s.memory.room_for(r) is not None


def goes_on(s: Scheduler, p: Pass) -> GoesOn | bool:
    """Whether passes like `p` follow it, by the policy; or a function that tells so of each, from begin and end."""
    if s.steady:
        return not s.should_yield(p, p.launched)  # else who waits stops it at its first preemption point
    if s.times is not None and not s.times.has_model:
        return False
    answer: GoesOn | bool = ask(s.policy, "alike", s, p)
    return answer if s.times is None or isinstance(answer, bool) else _learns(s.times, p, answer)


def _learns(pass_times: PassTimes, p: Pass, answer: GoesOn) -> GoesOn:
    """`answer`, asked when it is known what the pass took."""
    n, context = p.n_decode, p.decode_context

    def learns(begin: float, end: float) -> bool:
        nonlocal context
        forgotten = pass_times.observe_decode(n, context, end - begin)
        if not answer(begin, end):
            pass_times.unlearn(forgotten)
            return False
        context += n
        return True

    return learns


def repeat(s: Scheduler, p: Pass, ends: Sequence[float], told: bool) -> None:
    """Passes like `p` have ended at `ends`, none of which ended a request; `p` stands for the one that begins then.

    `told`: Whether the policy was told of them.
    """
    batch = p.decode
    assert batch is not None  # else there are no repeats
    times, now = len(ends), ends[-1]
    if s.times is not None and not told:
        for i in range(max(0, times - LAST), times):
            begin = ends[i - 1] if i else p.launched
            s.times.observe_decode(p.n_decode, p.decode_context + i * p.n_decode, ends[i] - begin)
    s.passes += times
    s.kv.take(batch.repeat(times))
    batch.running_s += now - p.launched
    p.id += times
    p.decode_context = batch.context
    p.after_prefill = False
    p.launched = now
