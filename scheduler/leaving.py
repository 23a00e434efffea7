"""A request leaves before it has all its tokens, wherever it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qllm.scheduler.passes import Pass
from qllm.scheduler.request import Request, State

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler


def leave(s: Scheduler, r: Request, now: float) -> Pass | None:
    """Take `r` out, at once or at the end of the pass that it runs in; a suspended pass in which nobody is left."""
    if r.state is State.IN_PASS or (r.batch is not None and r.batch is not s.ready.batch):
        return _leave_pass(s, r, now)
    if r.state is State.WAITING:
        s.waiting.discard(r, State.ABORTED)
    elif r.state is State.OFFLOADED:
        s.memory.forget(r)
    else:
        s.ready.remove(r)
    s.end(r, now, State.ABORTED)
    return None


def _leave_pass(s: Scheduler, r: Request, now: float) -> Pass | None:
    p = s.pass_of(r)
    assert p is not None  # I1
    p.aborted = [*(p.aborted or []), r]
    r.state = State.ABORTED
    if len(p.aborted) < len(p.prefill) + p.n_decode:
        return None
    p.cancelled = True
    if p is s.running:
        return None
    s.suspended_passes.remove(p)
    p.resume(now)
    disband(s, p, now, State.ABORTED)
    return p


def disband(s: Scheduler, p: Pass, now: float, state: State) -> list[Request]:
    """End everybody in a pass that will not be finished."""
    out = p.requests()
    s.memory.decoding -= p.n_decode
    for r in out:
        if r.batch is not None:
            r.batch.remove(r)
            r.blocks = s.kv.blocks(r.computed + 1)  # with the block taken for the token that was not made
        s.end(r, now, state)
    return out
