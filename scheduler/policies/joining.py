"""What may join a pass of LS without making it longer than it may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qllm.scheduler.passes import NEVER
from qllm.scheduler.request import Request

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler

LEAST_CHUNK = 16  #: tokens of a prompt; fewer are not worth a place in a pass, unless they are its last
TRIES = 5  #: to find how much fits, after which what was found will do


class LsPass:
    """A pass of LS in the making, and what it would take with others in it.

    Args:
        s: Predicts.
        chunks: Of LS prompts: (new tokens, tokens cached before).
        n: LS sequences that decode.
        context: Tokens that these hold.
    """

    def __init__(self, s: Scheduler, chunks: Sequence[tuple[int, int]], n: int, context: int):
        self._s = s
        self._chunks = list(chunks)
        self._n = n
        self._context = context
        self._each = _tokens_held(s, n, context)

    def seconds(self, decodes: int, chunk: tuple[int, int] | None = None) -> float:
        """Of the pass with so many further decodes and a further chunk; inf where that is not known."""
        chunks = self._chunks if chunk is None else [*self._chunks, chunk]
        found = self._s.seconds(chunks, self._n + decodes, self._context + decodes * self._each)
        return NEVER if found is None else found

    def decodes(self, limit: float, wanted: int, save: float = 0.0) -> int:
        """How many of the `wanted` further decodes keep the pass within `limit` seconds.

        Each makes the pass longer by less than the one before. So where all of them would fit into `save` seconds, none
        goes before they do.
        """
        if wanted <= 0 or self.seconds(wanted) <= limit:
            return max(wanted, 0)
        if self.seconds(wanted) <= save:
            return 0
        return _most(self.seconds, limit, wanted)

    def tokens(self, limit: float, decodes: int, first: Request, most: int) -> int:
        """How many tokens of the prompt of `first` keep the pass within `limit` seconds; 0 where that is few."""
        most = min(most, first.remaining)
        found = _most(lambda n: self.seconds(decodes, (n, first.computed)), limit, most)
        return found if found >= min(LEAST_CHUNK, first.remaining) else 0


def _most(seconds: Callable[[int], float], limit: float, high: int) -> int:
    """The most, up to a few, that keeps within `limit`; `seconds` grows with it, and 0 is known to be within."""
    at_high = seconds(high)
    if at_high <= limit:
        return high
    low, at_low = 0, seconds(0)
    for _ in range(TRIES):
        if high - low <= 1 or at_low >= limit or at_high == NEVER:
            break
        guess = low + int((high - low) * (limit - at_low) / (at_high - at_low))
        guess = min(max(guess, low + 1), high - 1)
        took = seconds(guess)
        if took <= limit:
            low, at_low = guess, took
        else:
            high, at_high = guess, took
    return low


def _tokens_held(s: Scheduler, n: int, context: int) -> int:
    """Tokens that others than those `n`, which hold `context`, hold on average."""
    held = (s.kv.total - s.kv.free) * s.kv.block_size
    return max(held - context, 0) // max(s.memory.holders(NEVER) - n, 1)
