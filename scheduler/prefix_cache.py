"""The prefix cache: KV of prompts, kept after its request has ended, for prompts that begin alike.

KV blocks are shared in *units* of so many blocks. A unit's key stands for all tokens from the start of the prompt to
the end of the unit, so equal keys mean equal KV. A unit is *held* while a request that is in the system uses it, then
it is *idle*: its blocks count as free, and the least recently used one is dropped where they are needed.

What is kept of a prompt is always its beginning: who holds a unit holds all before it, and lets go of the last first,
so a unit is never dropped before those behind it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict

from qllm.scheduler.request import Request


class PrefixCache:
    """Which units are held, by how many requests, and which are idle.

    `unit_blocks` KV blocks of `block_size` tokens each make a unit, one element of `Request.prefix`.
    """

    __slots__ = ("holders", "idle", "unit_blocks", "unit_tokens")

    def __init__(self, unit_blocks: int, block_size: int):
        self.unit_blocks = unit_blocks
        self.unit_tokens = unit_blocks * block_size
        self.holders: dict[int, int] = {}  #: of each unit that is held, how many there are
        self.idle: OrderedDict[int, None] = OrderedDict()  #: the others, least recently used first

    def __contains__(self, key: int) -> bool:
        return key in self.holders or key in self.idle

    @property
    def idle_blocks(self) -> int:
        """Blocks of the units that nobody holds."""
        return len(self.idle) * self.unit_blocks

    def find(self, r: Request) -> int:
        """Tokens at the beginning of the context of `r` that are there; at least one token is left to be computed."""
        most = min(len(r.prefix), (r.prompt_tokens + r.generated - 1) // self.unit_tokens)
        prefix = r.prefix
        return self.unit_tokens * bisect_left(range(most), True, key=lambda i: prefix[i] not in self)

    def held(self, r: Request) -> int:
        """Blocks of the units found for `r` (its `computed` tokens) that others hold."""
        keys = r.prefix[: r.computed // self.unit_tokens]
        return self.unit_blocks * sum(key in self.holders for key in keys)

    def hold(self, r: Request) -> int:
        """`r` uses the units that were found for it, and others may use those that it has computed.

        Returns:
            Blocks of the units that others hold already: `r` needs none for them, and gives back copies of its own.
        """
        held = 0
        units = min(len(r.prefix), r.computed // self.unit_tokens)
        for key in r.prefix[r.shared : units]:
            holders = self.holders.get(key, 0)
            held += holders > 0
            self.holders[key] = holders + 1
            self.idle.pop(key, None)  # idle ones count as free, and so does one of the two copies then
        r.shared = max(r.shared, units)
        return held * self.unit_blocks

    def let_go(self, r: Request) -> int:
        """`r` uses no unit any more; returns the blocks of those that nobody uses now."""
        unused = 0
        for key in reversed(r.prefix[: r.shared]):
            left = self.holders[key] - 1
            if left:
                self.holders[key] = left
            else:
                del self.holders[key]
                self.idle[key] = None
                unused += 1
        r.shared = 0
        return unused * self.unit_blocks

    def freed(self, r: Request, gone: Counter[int], wanted: Request) -> int:
        """Blocks that are free for `wanted` once `r` lets go of its own, after others did, as `gone` counts.

        `wanted` would hold what was found for it, so that is not free for it then. `r` is added to `gone`.
        """
        kept = set(wanted.prefix[: wanted.computed // self.unit_tokens])
        units = 0
        for key in r.prefix[: r.shared]:
            gone[key] += 1
            units += gone[key] == self.holders[key] and key not in kept
        return r.blocks - (r.shared - units) * self.unit_blocks

    def shrink(self, free: int) -> None:
        """Drop the least recently used idle units until their blocks are `free` at most."""
        while self.idle_blocks > free:
            self.idle.popitem(last=False)
