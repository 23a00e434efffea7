"""The prefill queues: one a level, in the policy's order."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from qllm.scheduler.request import Request, State

_Entry = tuple[bool, tuple[Any, ...], int, Request]  # (not admitted yet, the policy's order, entry id, request)


class WaitingQueues:
    """Requests that wait for (more of) their prefill, by level.

    Within a level those already admitted come first (they hold KV blocks), then the policy's order. A
    level is kept only while somebody waits at it.
    """

    __slots__ = ("_count", "_entry_ids", "_heaps", "_levels", "holding")

    def __init__(self) -> None:
        self._levels: list[float] = []  # those at which somebody waits, most urgent first
        self._heaps: dict[float, list[_Entry]] = {}
        self._count: dict[float, int] = {}
        self._entry_ids = 0
        self.holding: dict[int, Request] = {}  #: those between two chunks of their prompt, which hold KV blocks

    def __len__(self) -> int:
        return sum(self._count.values())

    def __iter__(self) -> Iterator[Request]:
        for level in self._levels:
            yield from (e[-1] for e in self._heaps[level] if _valid(e))

    def push(self, r: Request) -> None:
        """`r` waits from now on; where its order does not compare with others', TypeError, and it does not wait."""
        r.state = State.WAITING
        level = r.level
        if level not in self._heaps:
            self._heaps[level] = []
            self._count[level] = 0
            insort(self._levels, level)
        self._entry_ids += 1
        r.entry_id = self._entry_ids  # an entry is valid while its request has this id
        heap = self._heaps[level]
        try:
            heappush(heap, (r.blocks == 0, r.order, r.entry_id, r))
        except TypeError:
            heap[:] = [entry for entry in heap if entry[-1] is not r]
            heapify(heap)
            raise
        self._count[level] += 1
        if r.blocks:
            self.holding[r.id] = r

    def peek(self, level: float) -> Request | None:
        """The first in `level`'s queue."""
        heap = self._heaps.get(level)
        while heap:
            if _valid(heap[0]):
                return heap[0][-1]
            heappop(heap)
        return None

    def pop(self, level: float) -> None:
        """Take the request that `peek` just gave out of `level`'s queue."""
        self._leave(heappop(self._heaps[level])[-1])

    def discard(self, r: Request, state: State) -> None:
        """Waiting `r` leaves its queue for another reason than being launched."""
        r.state = state
        self._leave(r)

    def move(self, r: Request, level: int, order: tuple[Any, ...]) -> None:
        """Waiting `r` gets another place; it keeps the old one where `order` raises TypeError beside others'."""
        before = r.level, r.order
        self.discard(r, State.WAITING)
        r.level, r.order = level, order
        try:
            self.push(r)
        except TypeError:
            r.level, r.order = before
            self.push(r)
            raise

    def _leave(self, r: Request) -> None:
        level = r.level
        r.entry_id = 0
        self.holding.pop(r.id, None)
        self._count[level] -= 1
        if not self._count[level]:
            del self._count[level], self._heaps[level]
            self._levels.remove(level)

    def levels(self) -> list[float]:
        """Levels at which somebody waits, most urgent first."""
        return self._levels.copy()

    def level(self) -> float:
        """Most urgent level at which somebody waits; inf if nobody does."""
        return self._levels[0] if self._levels else float("inf")

    def count(self, level: float) -> int:
        """How many wait at `level`."""
        return self._count.get(level, 0)


def _valid(entry: _Entry) -> bool:
    return entry[-1].entry_id == entry[-2]
