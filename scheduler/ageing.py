"""Requests that have waited for too long become as urgent as any: the bound on starvation in queues."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from qllm.scheduler.passes import NEVER, time_spent
from qllm.scheduler.policy import ask
from qllm.scheduler.reprioritize import move_to
from qllm.scheduler.request import Request, State

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler

SLIP = 1e-9  #: seconds by which a sum of times may be off


class Ageing:
    """When each of the less urgent requests will have waited, in queues and suspended, for `bound` seconds in all."""

    __slots__ = ("_bound", "_heap", "_urgent", "next")

    def __init__(self, bound: float, urgent: float):
        self._bound = bound
        self._urgent = urgent  # who is as urgent as that does not age
        self._heap: list[tuple[float, int, Request]] = []  # (no sooner than then, id, request)
        self.next = NEVER  #: when to look again

    def add(self, r: Request) -> None:
        """`r` has come, or has another level."""
        if self._bound < NEVER and r.level > self._urgent:
            heappush(self._heap, (r.arrival + self._bound, r.id, r))
            self.next = self._heap[0][0]

    def promote(self, s: Scheduler, now: float) -> None:
        """Give those whose time has come the most urgent level that the policy calls latency-sensitive."""
        heap, urgent = self._heap, int(self._urgent)
        while heap and heap[0][0] <= now:
            r = heappop(heap)[2]
            if s.requests.get(r.id) is not r or r.level <= urgent or r.state is State.ABORTED:
                continue
            ran = time_spent(r, s.pass_of(r), now)[0]
            if now - r.arrival - ran < self._bound - SLIP:
                heappush(heap, (r.arrival + ran + self._bound, r.id, r))
                continue
            before, r.level = r.level, urgent
            try:
                order = ask(s.policy, "order", r)
            finally:
                r.level = before
            move_to(s, r, urgent, order)
        self.next = heap[0][0] if heap else NEVER
