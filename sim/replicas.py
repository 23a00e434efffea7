"""Several GPUs that serve the same model, each with its own scheduler, and the router that sends requests to them.

A router knows what a server in front of the GPUs knows: how many requests it sent to each that have not ended, and how
urgent they are. It knows no lengths of answers. One of them asks the GPUs what they hold of a prompt, and what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush

from qllm.scheduler import Request, RequestShed, RequestTooLarge, Scheduler
from qllm.sim.device import Device

ROUTERS = ("round_robin", "least_loaded", "ls_aware", "prefix_aware", "shared_queue")


class Replica:
    """One GPU as the router sees it.

    Attributes:
        scheduler: Decides for it.
        device: Runs what that decides.
        sent: Requests that were sent here.
        open: Those of them that have not ended, by priority.
    """

    def __init__(self, scheduler: Scheduler, device: Device):
        self.scheduler = scheduler
        self.device = device
        self.sent = 0
        self.open: dict[int, int] = {}

    def count(self, priority: float = float("inf")) -> int:
        """Open requests of that priority or more urgent."""
        return sum(n for level, n in self.open.items() if level <= priority)

    def to_compute(self, r: Request) -> int:
        """Tokens of prompts that come first here: those that wait and are as urgent, and what lacks of its own."""
        ahead = sum(one.remaining for one in self.scheduler.waiting if one.priority <= r.priority)
        return ahead + r.prompt_tokens - self.scheduler.memory.prefixes.find(r)

    @property
    def has_room(self) -> bool:
        """Whether fewer requests are open than fit a pass."""
        return self.count() < self.scheduler.limits.max_seqs


def meets(router: str, replica: Replica, r: Request) -> tuple[int, ...]:
    """What `r` would meet at a replica, by what `router` looks at; the smaller, the better.

    round_robin: how many were sent there. least_loaded and shared_queue: how many are open. ls_aware: how many are open
    that are as urgent or more, then how many in all; what is less urgent gives way, so it hardly counts. prefix_aware:
    tokens of prompts that are to be computed before its first token, those that the replica's prefix cache has left
    out; then how many are open, then how many were sent there, so that what is new spreads.
    """
    if router == "round_robin":
        return (replica.sent,)
    if router == "prefix_aware":
        return replica.to_compute(r), replica.count(), replica.sent
    return (replica.count(r.priority), replica.count()) if router == "ls_aware" else (replica.count(),)


class Fleet:
    """The replicas behind their router.

    With `shared_queue` requests wait in front of all replicas, most urgent first, until one has room; else each goes to
    the replica where it meets the least when it arrives, of equal ones to the first.

    Args:
        replicas: At least one.
        router: One of ROUTERS.
        rejected: Called with a request that cannot be served, and why.

    Attributes:
        waiting: In front of the replicas, a heap.

    Raises:
        ValueError: There is no router of that name.
    """

    def __init__(self, replicas: Sequence[Replica], router: str, rejected: Callable[[Request, str], None]):
        if router not in ROUTERS:
            raise ValueError(f"router is {router!r:.80}; allowed: {', '.join(ROUTERS)}")
        self.replicas = replicas
        self.waiting: list[tuple[int, float, int, Request]] = []
        self.is_queue = router == "shared_queue" and len(replicas) > 1  #: what ends on one makes room for who waits
        self._router = router
        self._rejected = rejected

    def arrive(self, r: Request, now: float) -> int | None:
        """Send `r` to a replica, and return which; None where it waits, or cannot be served."""
        i = self._best(r)
        if i is None:
            heappush(self.waiting, (r.priority, r.arrival, r.id, r))
            return None
        return self._send(i, r, now)

    def ended(self, i: int, done: Iterable[Request]) -> None:
        """Requests of replica `i` have ended."""
        open_ = self.replicas[i].open
        for r in done:
            open_[r.priority] -= 1

    def fill(self, now: float) -> Iterator[tuple[int, Request]]:
        """Send those that wait where there is room; each with its replica."""
        while self.waiting:
            r = self.waiting[0][-1]
            i = self._best(r)
            if i is None:
                return
            heappop(self.waiting)
            if self._send(i, r, now) is not None:
                yield i, r

    def _best(self, r: Request) -> int | None:
        if len(self.replicas) == 1 and self._router != "shared_queue":
            return 0
        found = [*range(len(self.replicas))]
        if self._router == "shared_queue":
            found = [i for i in found if self.replicas[i].has_room]
        return min(found, key=lambda i: meets(self._router, self.replicas[i], r), default=None)

    def _send(self, i: int, r: Request, now: float) -> int | None:
        replica = self.replicas[i]
        replica.sent += 1
        try:
            replica.scheduler.add(r, now)
        except (RequestTooLarge, RequestShed) as error:
            self._rejected(r, str(error))
            return None
        replica.open[r.priority] = replica.open.get(r.priority, 0) + 1
        replica.device.poke()
        return i
