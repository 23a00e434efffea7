"""Memory: the limits of one GPU, who holds KV blocks, and who has to give them up.

Rules: victims are strictly less urgent than the request that needs their blocks (else equals evict each other in turn),
and nobody is evicted unless that frees enough. Only a decode step that is short of blocks evicts within a level, the
last admitted first; ranks are kept for good, so the first admitted always gets on.
"""

from __future__ import annotations

from dataclasses import dataclass

from qllm.scheduler.decode import DecodePool, rank
from qllm.scheduler.kv import KVBudget
from qllm.scheduler.passes import NEVER
from qllm.scheduler.request import Request, SchedulerError, State
from qllm.scheduler.waiting import WaitingQueues


@dataclass(frozen=True)
class Limits:
    """What one GPU can hold.

    max_seqs: sequences in a pass (the paper's batch size B). max_batched_tokens: tokens in a pass; a longer prompt runs
    as several passes. kv_blocks, block_size: the KV budget, in blocks of block_size tokens. urgent_blocks: blocks that
    only requests of level <= 0 may be admitted to. max_suspended_tokens: tokens in suspended passes, whose activations
    are kept; a pass that would exceed it does not yield. evict: what happens to the KV of a request that has to give
    way, "recompute" (dropped) or "offload" (moved to host memory and back)."""

    max_seqs: int = 32
    max_batched_tokens: int = 8192
    kv_blocks: int = 65536
    block_size: int = 16
    urgent_blocks: int = 0
    max_suspended_tokens: int | None = None
    evict: str = "recompute"

    def __post_init__(self) -> None:
        for name in ("max_seqs", "max_batched_tokens", "kv_blocks", "block_size"):
            if getattr(self, name) < 1:
                raise SchedulerError(f"limits.{name} is {getattr(self, name)}, must be at least 1")
        if self.max_batched_tokens < self.max_seqs:
            raise SchedulerError(
                f"limits.max_batched_tokens is {self.max_batched_tokens}, must be at least max_seqs ({self.max_seqs}): "
                "each decoding sequence takes one token"
            )
        if not 0 <= self.urgent_blocks < self.kv_blocks:
            raise SchedulerError(f"limits.urgent_blocks is {self.urgent_blocks}, must be in [0, {self.kv_blocks})")
        if self.evict not in ("recompute", "offload"):
            raise SchedulerError(f"limits.evict is {self.evict!r}, must be recompute or offload")


class Memory:
    """Admission, eviction and return of requests under a KV budget."""

    def __init__(self, limits: Limits, waiting: WaitingQueues, ready: DecodePool):
        self.limits = limits
        self.kv = KVBudget(limits.kv_blocks, limits.block_size, limits.urgent_blocks)
        self.waiting = waiting
        self.ready = ready
        self.decoding = 0  #: requests that decode in running or suspended passes
        self.offloaded: list[Request] = []
        self._admitted: dict[int, int] = {}  # requests that hold blocks, by level
        self._admissions = 0
        self._moved: list[Request] = []  # offloaded since the last launch
        self._restored: list[Request] = []  # brought back since the last launch

    def holders(self, level: float) -> int:
        """Requests of `level` or more urgent that hold blocks."""
        return sum([n for lv, n in self._admitted.items() if lv <= level])

    def admit(self, r: Request) -> bool:
        """Take the KV blocks that the prefill of `r` needs, evicting strictly less urgent requests where that frees
        enough. Returns whether it has them."""
        victims = self.room_for(r)
        if victims is None:
            return False
        for v in victims:
            self._evict(v)
        r.blocks = self.kv.blocks(r.remaining)
        self.kv.take(r.blocks)
        self._admitted[r.level] = self._admitted.get(r.level, 0) + 1
        if r.admitted < 0:
            r.admitted = self._admissions
            self._admissions += 1
        return True

    def evict_last(self) -> None:
        """The least urgent, last admitted of those that decode or hold a part of their prefill gives its KV up."""
        self._evict(max(self._evictable(-NEVER), key=rank))

    def _evictable(self, above: float) -> list[Request]:
        held = [r for r in self.ready if r.level > above]
        return held + [r for r in self.waiting.holding.values() if r.level > above]

    def room_for(self, r: Request) -> list[Request] | None:
        """Whom to evict so that `r` can be admitted: nobody where blocks are free, less urgent requests (last admitted
        first) where theirs suffice, None where they do not or where a request in host memory goes first."""
        if self.offloaded and any(o.level <= r.level for o in self.offloaded):
            return None
        need = self.kv.blocks(r.remaining)
        room = self.kv.room(r.level)
        ready, most = len(self.ready) + self.decoding, self.limits.max_seqs
        if need + min(ready, most) <= room:  # a block for each decoding request stays free, lest one be evicted soon
            return []
        out = []
        for v in sorted(self._evictable(r.level), key=rank, reverse=True):
            v.sync()
            out.append(v)
            room += v.blocks
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
            if need + spare > self.kv.room(r.level):
                return
            del self.offloaded[0]
            r.blocks = self.kv.blocks(r.computed) if r.remaining == 1 and r.generated else need
            self.kv.take(r.blocks)
            self._admitted[r.level] += 1
            if r in self._moved:
                self._moved.remove(r)  # it never left
            else:
                self._restored.append(r)
            if r.remaining == 1 and r.generated:
                self.ready.add(r)
            else:
                self.waiting.push(r)

    def release(self, r: Request) -> None:
        """`r` gives its blocks back."""
        self.kv.give(r.blocks)
        self._admitted[r.level] -= 1
        r.blocks = 0

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
