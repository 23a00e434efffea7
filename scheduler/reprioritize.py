"""Another priority or level for a request that is in the system, wherever it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qllm.scheduler.policy import classify, policy_error
from qllm.scheduler.request import Request, SchedulerError, State

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler


def change_priority(s: Scheduler, r: Request, priority: int) -> None:
    """Give `r` another priority, and what follows from it: level, place in a queue, level of the pass that it is in.

    What the running pass computes stays as it is; where `r` goes next, and who may stop the pass, follow the new level.

    Raises:
        RequestTooLarge: With that priority `r` could never fit the KV budget. Nothing has changed.
        PolicyError: The policy broke, or gave what cannot be used. Nothing has changed.
    """
    before, r.priority = r.priority, priority
    try:
        level, order = classify(s.policy, r)
        s.kv.check_fits(r, level)
        move_to(s, r, level, order)
    except SchedulerError:
        r.priority = before
        raise
    s.ageing.add(r)


def move_to(s: Scheduler, r: Request, level: int, order: tuple[Any, ...]) -> None:
    """Give `r` that level and that place in its queue. Raises PolicyError, and nothing has changed."""
    was = r.level
    try:
        if r.state is State.WAITING:
            s.waiting.move(r, level, order)
        else:
            min(order, r.order)  # where its KV has to give way, it is queued by it
    except TypeError as error:
        raise policy_error(s.policy, f"order gave {order!r}; comparing it", error) from error
    p = s.pass_of(r)
    if r.batch is not None or r.state is State.READY:
        s.ready.move(r, level)
    r.level, r.order = level, order
    s.memory.moved(r, was)
    if p is not None:
        p.find_levels()
