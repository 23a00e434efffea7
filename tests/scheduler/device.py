"""A device for tests of policies: passes take what a function says, and stop wherever the policy wants them to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from qllm.scheduler import Pass, Request, Scheduler

LEAST_S = 1e-6  #: between two questions whether a pass stops, whatever the policy says


class Piece(NamedTuple):
    """A stretch that a pass ran."""

    start: float
    end: float
    requests: list[Request]


def by_tokens(p: Pass) -> float:
    """A pass takes a unit of time a token."""
    return p.tokens


def play(
    s: Scheduler,
    requests: Iterable[Request],
    seconds: Callable[[Pass], float] = by_tokens,
    *,
    until: float = float("inf"),
    decided: Callable[[Pass], None] = lambda p: None,
) -> list[Piece]:
    """Serve `requests` until nobody is left, or until the first pass that ends at `until` or later.

    At one instant a pass ends, then requests arrive, then the scheduler decides. `decided` sees each decision.
    """
    coming = sorted(requests, key=lambda r: (r.arrival, r.id), reverse=True)
    left: dict[int, float] = {}
    pieces: list[Piece] = []
    now = 0.0

    def arrive() -> None:
        while coming and coming[-1].arrival <= now:
            s.add(coming.pop(), now)

    arrive()
    while now < until:
        p = s.next(now)
        if p is None:
            if not coming:
                break
            now = coming[-1].arrival
            arrive()
            continue
        decided(p)
        start, end = now, now + left.pop(p.id, seconds(p))
        members = p.requests()
        stopped = False
        while now < end and not stopped:
            again = max(s.recheck_at(p, now), now + LEAST_S)
            now = min(end, again, coming[-1].arrival if coming else end)
            if now < end:
                arrive()
                stopped = s.should_yield(p, now)
        pieces.append(Piece(start, now, members))
        if stopped:
            left[p.id] = end - now
            s.suspended(p, now)
        else:
            s.finished(p, now)
            arrive()
    return pieces
