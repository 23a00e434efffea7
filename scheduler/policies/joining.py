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
        each: Tokens that a further decode holds.
    """

    def __init__(self, s: Scheduler, chunks: Sequence[tuple[int, int]], n: int, context: int, each: int):
        self._s = s
        self._chunks = list(chunks)
        self._n = n
        self._context = context
        self._each = each
        self._known: dict[tuple[int, tuple[int, int] | None], float] = {}

    def seconds(self, decodes: int, chunk: tuple[int, int] | None = None) -> float:
        """Of the pass with so many further decodes and a further chunk; inf where that is not known."""
        key = decodes, chunk
        if key not in self._known:
            chunks = self._chunks if chunk is None else [*self._chunks, chunk]
            found = self._s.seconds(chunks, self._n + decodes, self._context + decodes * self._each)
            self._known[key] = NEVER if found is None else found
        return self._known[key]

    def decodes(self, limit: float, wanted: int, save: float = 0.0) -> int:
        """How many of the `wanted` further decodes keep the pass within `limit` seconds.

        Each makes the pass longer by less than the one before. So where all of them would fit into `save` seconds, none
        goes before they do.
        """
        if wanted <= 0:
            return 0
        of_all = self.seconds(wanted)
        if of_all <= limit:
            return wanted
        return 0 if of_all <= save else _most(self.seconds, limit, 0, wanted)

    def tokens(self, limit: float, decodes: int, first: Request, most: int) -> int:
        """How many tokens of the prompt of `first` keep the pass within `limit` seconds; 0 where that is few."""
        most, least = min(most, first.remaining), min(LEAST_CHUNK, first.remaining)
        return _most(lambda n: self.seconds(decodes, (n, first.computed)), limit, least, most)


def _most(seconds: Callable[[int], float], limit: float, low: int, high: int) -> int:
    """The most from `low` to `high`, up to a few, that keeps within `limit`; 0: not even `low`. `seconds` grows."""
    at_high = seconds(high)
    if at_high <= limit:
        return high
    at_low = seconds(low)
    if at_low > limit:
        return 0
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


def tokens_held(s: Scheduler, above: float = -NEVER) -> int:
    """Tokens that those who are ready to decode, at levels less urgent than `above`, hold on average."""
    held = found = 0
    for r in s.ready:
        if r.level > above:
            found += 1
            held += r.computed + (0 if r.batch is None else r.batch.passes - r.joined)
    return held // max(found, 1)
