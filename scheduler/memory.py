"""Memory: the limits of one GPU, who holds KV blocks, and who has to give them up.

Rules: victims are strictly less urgent than the request that needs their blocks (else equals evict each other in turn),
and nobody is evicted unless that frees enough. Only a decode pass that is short of blocks evicts within a level, the
last admitted first; ranks are kept for good, so the first admitted always gets on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from numbers import Integral

from qllm.scheduler.decode import DecodePool, rank
from qllm.scheduler.passes import NEVER
from qllm.scheduler.prefix_cache import PrefixCache
from qllm.scheduler.request import Request, RequestTooLarge, SchedulerError, State
from qllm.scheduler.waiting import WaitingQueues

UNBOUNDED = 2**62  # KV blocks where nobody says how many there are


def residents(max_seqs: int, max_resident: int | None) -> int:
    """How many requests hold memory at a time where each keeps more than blocks; unless said, urgent ones on top."""
    return 2 * max_seqs if max_resident is None else max_resident


@dataclass(frozen=True)
class Limits:
    """What one GPU can hold.

    Attributes:
        max_seqs: Sequences in a pass (the paper's batch size B).
        max_batched_tokens: Tokens in a pass; a longer prompt runs as several passes.
        kv_blocks: The KV budget, in blocks. None: what fits, which an engine works out; a scheduler on its own has no
            bound.
        block_size: Tokens in a KV block.
        urgent_blocks: KV blocks that only requests of the policy's `urgent` levels may be admitted to.
        max_suspended_tokens: Tokens in suspended passes, whose activations are kept; a pass that would exceed it does
            not yield. None: no bound.
        evict: What happens to the KV of a request that has to give way: "recompute" (dropped) or "offload" (moved to
            host memory and back).
        max_resident: Requests that hold KV blocks at a time, of all levels; at the bound one that is more urgent evicts
            another. An engine sets it where sequences keep more than KV blocks. None: no bound.

    Raises:
        SchedulerError: A limit is out of its range; the message names it.
    """

    max_seqs: int = 32
    max_batched_tokens: int = 8192
    kv_blocks: int | None = None
    block_size: int = 16
    urgent_blocks: int = 0
    max_suspended_tokens: int | None = None
    evict: str = "recompute"
    max_resident: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "urgent_blocks" else 1
            if field.name == "evict" or (value is None and field.default is None):
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise SchedulerError(f"limits.{field.name} is {value!r:.80}, must be a whole number, at least {least}")
        if self.max_batched_tokens < self.max_seqs:
            raise SchedulerError(
                f"limits.max_batched_tokens is {self.max_batched_tokens}, must be at least max_seqs "
                f"({self.max_seqs!r:.80}): "
                "each decoding sequence takes one token"
            )
        if not 0 <= self.urgent_blocks < self.blocks:
            raise SchedulerError(f"limits.urgent_blocks is {self.urgent_blocks!r:.80}, must be in [0, {self.blocks})")
        if self.evict not in ("recompute", "offload"):
            raise SchedulerError(f"limits.evict is {self.evict!r:.80}, must be recompute or offload")

    @property
    def blocks(self) -> int:
        """`kv_blocks`, or a number that nobody reaches."""
        return UNBOUNDED if self.kv_blocks is None else self.kv_blocks


class KVBudget:
    """How many KV blocks there are and how many are free. Which block is whose is the engine's business.

    `total` blocks of `block_size` tokens; `reserve` of them are for urgent requests only (level <= `urgent`). Units of
    `prefixes`, `prefix_blocks` blocks each, that are idle count as free.
    """

    __slots__ = ("block_size", "free", "least_free", "prefixes", "reserve", "total", "urgent")

    def __init__(self, total: int, block_size: int, reserve: int, urgent: int, prefix_blocks: int = 1):
        self.total = total
        self.block_size = block_size
        self.reserve = reserve
        self.urgent = urgent
        self.free = total
        self.least_free = total  #: the fewest that were ever free
        self.prefixes = PrefixCache(prefix_blocks, block_size)

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def capacity(self, level: int) -> int:
        """Blocks that a request of `level` may hold at most."""
        return self.total if level <= self.urgent else self.total - self.reserve

    def room(self, level: int) -> int:
        """Free blocks that a request of `level` may be admitted to."""
        return self.free if level <= self.urgent else self.free - self.reserve

    def check_fits(self, r: Request, level: int) -> None:
        """Raise RequestTooLarge where `r`, at `level`, could never have the blocks that it takes in the end."""
        need, capacity = self.blocks(r.prompt_tokens + r.max_tokens - 1), self.capacity(level)
        if need > capacity:
            raise RequestTooLarge(
                f"request {r.id}: {r.prompt_tokens} prompt and {r.max_tokens} output tokens take {need} KV blocks of "
                f"{self.block_size} tokens; its class may use {capacity}"
            )

    @property
    def peak(self) -> float:
        """The largest share of the blocks that was ever in use."""
        return 1 - self.least_free / self.total

    def take(self, n: int) -> None:
        """Take `n` blocks; raises SchedulerError where that many are not free (invariant I4)."""
        if n > self.free:
            raise SchedulerError(f"{n} KV blocks asked for, {self.free} free")
        self.free -= n
        self.least_free = min(self.least_free, self.free)
        if self.prefixes.idle:
            self.prefixes.shrink(self.free)

    def give(self, n: int) -> None:
        """Give `n` blocks back; raises SchedulerError where more come back than were taken (invariant I4)."""
        if self.free + n > self.total:
            raise SchedulerError(f"{n} KV blocks given back, but only {self.total - self.free} were taken")
        self.free += n


class Memory:
    """Admission, eviction and return of requests under a KV budget, and what of their prompts is kept for others."""

    def __init__(self, limits: Limits, urgent: int, waiting: WaitingQueues, ready: DecodePool, prefix_blocks: int = 1):
        self.limits = limits
        self.kv = KVBudget(limits.blocks, limits.block_size, limits.urgent_blocks, urgent, prefix_blocks)
        self.prefixes = self.kv.prefixes
        self.waiting = waiting
        self.ready = ready
        self.resident = 0  #: requests that hold blocks
        self.decoding = 0  #: requests that decode in running or suspended passes
        self.offloaded: list[Request] = []
        self._admitted: dict[int, int] = {}  # requests that hold blocks, by level
        self._admissions = 0
        self._moved: list[Request] = []  # offloaded since the last launch
        self._restored: list[Request] = []  # brought back since the last launch

    def holders(self, level: float) -> int:
        """Requests of `level` or more urgent that hold blocks."""
        return sum([n for lv, n in self._admitted.items() if lv <= level])

    def has_slot(self, level: float) -> bool:
        """Whether one more request of `level` may be under way.

        Fewer than `limits.max_seqs` of that level or more urgent are, and fewer than `limits.max_resident` in all, or
        one of them would give way.
        """
        most = self.limits.max_seqs
        if self.resident >= most and self.holders(level) >= most:
            return False
        return not self._is_full() or bool(self._evictable(level))

    def _is_full(self) -> bool:
        return self.resident >= (self.limits.max_resident or UNBOUNDED)

    def can_prefill(self, level: float) -> bool:
        """Whether the first request that waits at `level` could be launched now."""
        r = self.waiting.peek(level)
        if r is None:
            return False
        return bool(r.blocks) or (self.has_slot(level) and self.room_for(r) is not None)

    def admit(self, r: Request) -> bool:
        """Take the KV blocks that the prefill of `r` needs, and say whether it has them.

        Strictly less urgent requests are evicted where that frees enough.
        """
        victims = self.room_for(r)
        if victims is None:
            return False
        for v in victims:
            self._evict(v)
        r.blocks = self.kv.blocks(r.prompt_tokens + r.generated)
        self.kv.take(r.blocks - self.prefixes.hold(r))
        self._hold(r)
        if r.admitted < 0:
            r.admitted, r.cached = self._admissions, r.computed
            self._admissions += 1
        return True

    def look_up(self, r: Request) -> None:
        """Find what of `r` is in the prefix cache and need not be computed, unless it holds blocks already."""
        if r.prefix and not r.blocks:
            r.computed = self.prefixes.find(r)

    def share(self, r: Request) -> None:
        """What `r` has computed may serve others that begin alike."""
        if r.prefix:
            self.kv.give(self.prefixes.hold(r))

    def evict_last(self) -> None:
        """The least urgent, last admitted of those that decode or hold a part of their prefill gives its KV up."""
        self._evict(max(self._evictable(-NEVER), key=rank))

    def _evictable(self, above: float) -> list[Request]:
        return [r for r in (*self.ready, *self.waiting.holding.values()) if r.level > above]

    def room_for(self, r: Request) -> list[Request] | None:
        """Whom to evict so that `r` can be admitted.

        Nobody where blocks are free, and a place among those that hold some; less urgent requests, last admitted first,
        where theirs suffice; None where they do not, or where a request in host memory goes first.
        """
        if self.offloaded and any(o.level <= r.level for o in self.offloaded):
            return None
        self.look_up(r)
        need = self.kv.blocks(r.prompt_tokens + r.generated) - self.prefixes.held(r)
        room = self.kv.room(r.level)
        ready, most = len(self.ready) + self.decoding, self.limits.max_seqs
        # A block for each decoding request stays free, lest one be evicted soon.
        if need + min(ready, most) <= room and not self._is_full():
            return []
        out, gone = [], Counter[int]()
        for v in sorted(self._evictable(r.level), key=rank, reverse=True):
            v.sync()
            out.append(v)
            room += self.prefixes.freed(v, gone, r)
            ready -= v.state is State.READY
            if need + min(ready, most) <= room:
                return out
        return None

    def _evict(self, r: Request) -> None:
        if r.state is State.READY:
            self.ready.remove(r)
        else:
            self.waiting.discard(r, State.WAITING)
        self.release(r)
        r.evictions += 1
        if self.limits.evict == "offload":
            r.state = State.OFFLOADED
            self.offloaded.append(r)
            self._moved.append(r)
        else:
            r.computed = 0
            self.waiting.push(r)

    def restore_offloaded(self) -> None:
        """Offloaded requests return, most urgent and first admitted first, as far as blocks are free."""
        self.offloaded.sort(key=rank)
        while self.offloaded:
            r = self.offloaded[0]
            need = self.kv.blocks(max(r.computed + 1, r.prompt_tokens + r.generated))
            spare = min(len(self.ready) + self.decoding, self.limits.max_seqs)
            if need + spare > self.kv.room(r.level) or self._is_full():
                return
            del self.offloaded[0]
            r.blocks = self.kv.blocks(r.computed) if r.remaining == 1 and r.generated else need
            self.kv.take(r.blocks)
            self._hold(r)
            if r in self._moved:
                self._moved.remove(r)  # it never left
            else:
                self._restored.append(r)
            if r.remaining == 1 and r.generated:
                self.ready.add(r)
            else:
                self.waiting.push(r)

    def _hold(self, r: Request) -> None:
        self.resident += 1
        self._admitted[r.level] = self._admitted.get(r.level, 0) + 1

    def _let_go(self, level: int) -> None:
        self.resident -= 1
        left = self._admitted[level] - 1
        if left:
            self._admitted[level] = left
        else:
            del self._admitted[level]

    def release(self, r: Request) -> None:
        """`r` gives its blocks back; those in the prefix cache stay there as long as nobody needs them."""
        own = r.blocks - r.shared * self.prefixes.unit_blocks
        self.kv.give(own + self.prefixes.let_go(r))
        r.blocks = 0
        self._let_go(r.level)

    def moved(self, r: Request, before: int) -> None:
        """`r` was of level `before` until now."""
        if r.blocks:
            self._let_go(before)
            self._hold(r)

    def forget(self, r: Request) -> None:
        """Offloaded `r` is not coming back."""
        self.offloaded.remove(r)
        if r in self._moved:
            self._moved.remove(r)

    def moves(self) -> tuple[list[Request] | None, list[Request] | None]:
        """Requests offloaded and brought back since this was last asked; None where there are none."""
        if not self._moved and not self._restored:
            return None, None
        moves = self._moved or None, self._restored or None
        self._moved, self._restored = [], []
        return moves
