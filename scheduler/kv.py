"""The KV budget: how many blocks there are and how many are free. Which block is whose is the engine's business."""

from __future__ import annotations

from qllm.scheduler.request import SchedulerError


class KVBudget:
    """`total` blocks of `block_size` tokens; `reserve` of them are for urgent classes only (level <= `urgent`)."""

    __slots__ = ("block_size", "free", "reserve", "total", "urgent")

    def __init__(self, total: int, block_size: int, reserve: int = 0, urgent: int = 0):
        if total < 1 or block_size < 1 or not 0 <= reserve < total:
            raise SchedulerError(
                f"KV budget of {total} blocks of {block_size} tokens with {reserve} reserved: "
                "blocks and block size must be at least 1, the reserve at least 0 and below the total"
            )
        self.total = total
        self.block_size = block_size
        self.reserve = reserve
        self.urgent = urgent
        self.free = total

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def room(self, level: int) -> int:
        """Free blocks that a request of `level` may be admitted to."""
        return self.free if level <= self.urgent else self.free - self.reserve

    def take(self, n: int) -> None:
        """Take `n` blocks; raises SchedulerError where that many are not free (invariant I4)."""
        if n > self.free:
            raise SchedulerError(f"{n} KV blocks asked for, {self.free} free")
        self.free -= n

    def give(self, n: int) -> None:
        """Give `n` blocks back; raises SchedulerError where more come back than were taken (invariant I4)."""
        if self.free + n > self.total:
            raise SchedulerError(f"{n} KV blocks given back, but only {self.total - self.free} were taken")
        self.free += n
