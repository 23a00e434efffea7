"""Sequences that decode together.

A decode pass moves every member on by one token. Touching each of them each time would cost a simulation most of its
time, so the batch counts *passes* and keeps sums: a member's progress follows from the pass at which it joined, the
members that end are found in a heap keyed by the pass at which they end, and the KV blocks that a pass needs are
counted by the phase of each member's length modulo the block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush, nlargest
from operator import attrgetter

from qllm.scheduler.request import Request, State


class DecodeBatch:
    """A set of requests that decode together; every operation is O(1) or O(log n) in its size."""

    __slots__ = (
        "_ends",
        "_phase",
        "block_size",
        "context",
        "level",
        "levels",
        "members",
        "passes",
        "preemptions",
        "running_s",
        "suspended_s",
    )

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.members: dict[int, Request] = {}
        self.passes = 0  #: decode passes done
        self.context = 0  #: tokens in KV, summed over members, before the next pass
        self.levels: dict[int, int] = {}  #: members by level
        self.level: float = float("inf")  #: most urgent level among the members
        self._ends: list[tuple[int, int, Request]] = []
        self._phase = [0] * block_size
        # clocks that members read when they join and when they leave
        self.running_s = 0.0
        self.suspended_s = 0.0
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self.members)

    def add(self, r: Request) -> None:
        """`r` joins: it decodes from the next pass on."""
        passes = self.passes
        self.members[r.id] = r
        self.context += r.computed
        self._phase[(r.computed - passes) % self.block_size] += 1
        level = r.level
        self.levels[level] = self.levels.get(level, 0) + 1
        if level < self.level:
            self.level = level
        r.batch, r.joined, r.last_pass = self, passes, passes + r.max_tokens - r.generated
        r.running_s -= self.running_s
        r.suspended_s -= self.suspended_s
        r.preemptions -= self.preemptions
        heappush(self._ends, (r.last_pass, r.admitted, r))

    def sync(self, r: Request) -> None:
        """Write the progress of member `r` (not its record of times) into it."""
        done = self.passes - r.joined
        r.joined = self.passes
        r.generated += done
        r.computed += done
        r.blocks = -(-r.computed // self.block_size)

    def remove(self, r: Request) -> None:
        """`r` leaves with its progress and record up to date."""
        self.sync(r)
        del self.members[r.id]
        self.context -= r.computed
        self._phase[(r.computed - self.passes) % self.block_size] -= 1
        level = r.level
        left = self.levels[level] - 1
        if left:
            self.levels[level] = left
        else:
            del self.levels[level]
            self.level = min(self.levels, default=float("inf"))
        r.running_s += self.running_s
        r.suspended_s += self.suspended_s
        r.preemptions += self.preemptions
        r.batch = None

    def move(self, r: Request, level: int) -> None:
        """Member `r` is of `level` from now on."""
        levels = self.levels
        levels[r.level] -= 1
        if not levels[r.level]:
            del levels[r.level]
        levels[level] = levels.get(level, 0) + 1
        r.level, self.level = level, min(levels)

    def blocks_needed(self) -> int:
        """KV blocks that the next pass takes: one for each member whose last block is full."""
        return self._phase[-self.passes % self.block_size]

    def repeats(self, free: int) -> int:
        """How many passes from now on end nobody, and leave blocks for the pass after them where `free` are free."""
        ends = self._ends
        while ends[0][2].batch is not self or ends[0][2].last_pass != ends[0][0]:  # it left before
            heappop(ends)
        rounds = free // len(self.members)  # each takes one block for each member
        return min(ends[0][0] - self.passes - 1, rounds * self.block_size)

    def repeat(self, times: int) -> int:
        """So many passes were done that ended nobody; returns the KV blocks that those after the first took."""
        first = self.passes + 1
        self.passes += times
        self.context += times * len(self.members)
        rounds, left = divmod(times, self.block_size)
        phase, size = self._phase, self.block_size
        return rounds * len(self.members) + sum([phase[-i % size] for i in range(first, first + left)])

    def advance(self) -> list[Request]:
        """A pass was done: every member has one token more. Returns those that have all their tokens: they leave."""
        self.passes = passes = self.passes + 1
        self.context += len(self.members)
        ends = self._ends
        out: list[Request] = []
        while ends and ends[0][0] <= passes:
            end, _, r = heappop(ends)
            if r.batch is self and r.last_pass == end:  # else: it left before
                self.remove(r)
                out.append(r)
        return out


class DecodePool:
    """The requests that are ready to decode.

    At most `size` are in the batch, most urgent level first and within a level the first admitted first; the others
    sit idle beside it. A pass borrows the batch (:meth:`check_out`) and gives it back (:meth:`check_in`). A policy may
    leave fewer than `size` places open (:meth:`resize`).
    """

    __slots__ = ("_idle", "_idle_heap", "_idle_levels", "_spare", "batch", "places", "size")

    def __init__(self, size: int, block_size: int):
        self.size = size
        self.places = size  #: in the batch, as the last decision left them
        self.batch = DecodeBatch(block_size)
        self._spare: DecodeBatch | None = None  # empty; stands in while a pass has the batch
        self._idle: dict[int, Request] = {}
        self._idle_levels: dict[int, int] = {}
        self._idle_heap: list[tuple[int, int, Request]] = []

    def __len__(self) -> int:
        return len(self.batch.members) + len(self._idle)

    def __iter__(self) -> Iterator[Request]:
        yield from self.batch.members.values()
        yield from self._idle.values()

    @property
    def levels(self) -> dict[int, int]:
        """Ready requests by level, idle ones included."""
        found = self.batch.levels.copy()
        for level, n in self._idle_levels.items():
            found[level] = found.get(level, 0) + n
        return found

    def count(self, level: float) -> int:
        """Ready requests at `level` or more urgent."""
        return sum([n for levels in (self.batch.levels, self._idle_levels) for lv, n in levels.items() if lv <= level])

    def add(self, r: Request) -> None:
        """`r` is ready to decode."""
        r.state = State.READY
        if len(self.batch.members) < self.places:
            if self._idle:  # places that were left open go to the most urgent of all
                self._set_idle(r)
                self.refill()
            else:
                self.batch.add(r)
            return
        batch = self.batch
        if r.level <= max(batch.levels):
            worst = max(batch.members.values(), key=rank)
            if rank(r) < rank(worst):
                batch.remove(worst)
                batch.add(r)
                r = worst
        self._set_idle(r)

    def remove(self, r: Request) -> None:
        """`r` leaves (evicted, aborted)."""
        if r.batch is self.batch:
            self.batch.remove(r)
        else:
            del self._idle[r.id]
            self._uncount_idle(r.level)

    def move(self, r: Request, level: int) -> None:
        """`r`, ready or decoding in a pass, is of `level` from now on; places in the batch go to the most urgent."""
        if r.batch is not None and r.batch is not self.batch:
            r.batch.move(r, level)
            self.refill()  # so that those who sit idle compete with it when the pass gives its batch back
            return
        self.remove(r)
        self.refill()
        r.level = level
        self.add(r)

    def refill(self) -> None:
        """Idle requests take the free places in the batch."""
        while self._idle and len(self.batch) < self.places:
            level, _, r = heappop(self._idle_heap)
            if level == r.level and self._idle.pop(r.id, None) is not None:  # else it left, or has moved since
                self._uncount_idle(level)
                self.batch.add(r)

    def resize(self, places: int) -> None:
        """The batch has so many places from now on, at least one, and the most urgent have them."""
        self.places = places
        if len(self.batch.members) > places:
            self.trim(places)
        else:
            self.refill()

    def trim(self, size: int) -> None:
        """The batch keeps its `size` most urgent members; the others sit idle until the next :meth:`refill`."""
        surplus = len(self.batch.members) - size
        if surplus > 0:
            for r in nlargest(surplus, self.batch.members.values(), key=rank):
                self.batch.remove(r)
                self._set_idle(r)

    def check_out(self) -> DecodeBatch:
        """Hand the batch to a pass; its members are not ready until it comes back."""
        batch = self.batch
        self.batch = self._spare if self._spare is not None else DecodeBatch(batch.block_size)
        self._spare = None
        return batch

    def check_in(self, batch: DecodeBatch) -> None:
        """The pass that borrowed `batch` has ended."""
        here = self.batch
        if here.members:
            batch, here = self._merge(batch, here)
        self.batch, self._spare = batch, here

    def _merge(self, batch: DecodeBatch, here: DecodeBatch) -> tuple[DecodeBatch, DecodeBatch]:
        """One batch of both, and the other, empty. Where places are short, the most urgent have them."""
        self.refill()
        both = [*here.members.values(), *batch.members.values()]
        if len(both) > (places := max(self.places, len(here.members))):
            for r in sorted(both, key=rank)[places:]:
                (here if r.batch is here else batch).remove(r)
                self._set_idle(r)
        if len(here.members) > len(batch.members):  # fewer move so
            here, batch = batch, here
        for r in list(here.members.values()):
            here.remove(r)
            batch.add(r)
        return batch, here

    def _set_idle(self, r: Request) -> None:
        level = r.level
        self._idle[r.id] = r
        self._idle_levels[level] = self._idle_levels.get(level, 0) + 1
        heappush(self._idle_heap, (level, r.admitted, r))

    def _uncount_idle(self, level: int) -> None:
        left = self._idle_levels[level] - 1
        if left:
            self._idle_levels[level] = left
        else:
            del self._idle_levels[level]


#: Order of those under way, (level, admitted): most urgent first, then first admitted.
rank: Callable[[Request], tuple[int, int]] = attrgetter("level", "admitted")
