"""What the GPUs of a simulation hold over time, noted after each decision and each arrival."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qllm.scheduler import Pass, Request, Scheduler, State
from qllm.traces.results import LoadPoint, LoadRecord


class WatchedScheduler(Scheduler):
    """A scheduler that leaves a `LoadPoint` with every decision, and with every request that comes.

    It is asked before each pass, so that none of those that a simulation may run unasked (repeats.py) is missing; it
    decides the same.

    Args:
        load: Where the points go. Ids of requests are their places in its `cls`.
        replica: Number of its GPU.
        scheduler: What `Scheduler` takes.
    """

    def __init__(self, load: LoadRecord, replica: int, *scheduler: Any):
        super().__init__(*scheduler)
        self.steady = self.asks_alike = False
        self._load = load
        nobody = (0,) * len(load.classes)
        self._in_system = [*nobody]
        self._last = LoadPoint(0.0, 0.0, nobody, nobody, nobody, replica)

    def add(self, r: Request, now: float) -> None:
        super().add(r, now)
        load, cls = self._load, self._load.cls[r.id]
        load.sent[r.id] = now
        self._in_system[cls] += 1
        waiting = tuple(n + (place == cls) for place, n in enumerate(self._last.waiting))
        self._note(self._last._replace(at=now, waiting=waiting))

    def end(self, r: Request, now: float, state: State) -> None:
        super().end(r, now, state)
        self._in_system[self._load.cls[r.id]] -= 1

    def next(self, now: float) -> Pass | None:
        p = super().next(now)
        ready = self._count(self.ready)
        suspended = self._count(r for q in self.suspended_passes for r in q.requests())
        running = self._count(() if p is None else p.requests())
        # Whoever is in the system and nowhere else waits (I1): no need to look at all of a long queue.
        waiting = zip(self._in_system, ready, suspended, running, strict=True)
        self._note(
            self._last._replace(
                at=now,
                kv_used=1 - self.kv.free / self.kv.total,
                waiting=tuple(n - a - b - c for n, a, b, c in waiting),
                ready=tuple(ready),
                suspended=tuple(suspended),
            )
        )
        return p

    def _note(self, point: LoadPoint) -> None:
        self._last = point
        self._load.points.append(point)

    def _count(self, requests: Iterable[Request]) -> list[int]:
        """How many of each class."""
        cls, counts = self._load.cls, [0] * len(self._load.classes)
        for r in requests:
            counts[cls[r.id]] += 1
        return counts
