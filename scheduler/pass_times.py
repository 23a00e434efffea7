"""How long a pass will take: by a model of its steps where there is one, corrected by what passes took."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence

from qllm.scheduler.passes import Pass

#: ((new tokens, tokens cached before) of each prompt's chunk, sequences that decode, tokens that these hold) -> seconds
PassSeconds = Callable[[Sequence[tuple[int, int]], int, int], float]

WEIGHT = 1 / 8  #: of the last pass, in what is known of passes like it, where there is no model
LAST = 8  #: passes whose ratio of what they took to what was predicted corrects the model; older ones are forgotten
TRUSTED = 4.0  #: a prediction is corrected by at most this factor, either way


class PassTimes:
    """Predicts the seconds of passes and learns from those that ended.

    With a model, a pass is predicted by it, times what the last passes took of what it said of them, on average: apart
    for passes that only decode, and for those with prompts. Without one, a pass takes what passes of its kind and
    number of tokens took; sizes between two known ones lie between them, larger ones grow in proportion, and before any
    pass has run nothing is known.

    Args:
        model: Of the device; None: there is none.
    """

    def __init__(self, model: PassSeconds | None = None):
        self._model = model
        self._ratio = [1.0, 1.0]  # of passes that only decode, of passes with prompts: the mean of the last
        self._last = tuple(deque([1.0] * LAST, LAST) for _ in self._ratio)
        self._decodes = (0, 0)  # the passes that only decode of which the model was asked last ...
        self._decodes_s = 0.0  # ... and what it said
        self._sizes: tuple[list[int], list[int]] = ([], [])  # known numbers of tokens, in order
        self._seconds: tuple[dict[int, float], dict[int, float]] = ({}, {})

    def seconds(self, chunks: Sequence[tuple[int, int]], n_decode: int = 0, context: int = 0) -> float | None:
        """Return the predicted seconds of a pass, or None where nothing is known.

        Args:
            chunks: Of prompts: (new tokens, tokens cached before).
            n_decode: Sequences that decode.
            context: Tokens that these hold, all together.
        """
        if self._model is not None:
            if chunks:
                return self._ratio[1] * self._model(chunks, n_decode, context)
            return self._ratio[0] * self._decode_seconds(n_decode, context)
        tokens = n_decode
        for new, _ in chunks:
            tokens += new
        return self._learnt(1 if chunks else 0, tokens)

    def observe(self, p: Pass) -> None:
        """Learn from a pass that has ended. One that moved KV to or from host memory tells nothing."""
        if p.restored or p.offloaded or not p.running_s > 0:
            return
        kind = 1 if p.prefill else 0
        if self._model is None:
            known, size = self._seconds[kind], _rounded(p.tokens)
            if size in known:
                known[size] += WEIGHT * (p.running_s - known[size])
            else:
                known[size] = p.running_s
                insort(self._sizes[kind], size)
            return
        if p.prefill:
            said = self._model([(c.tokens, c.context) for c in p.prefill], p.n_decode, p.decode_context)
            self._correct(1, p.running_s / said)
        else:
            self.observe_decode(p.n_decode, p.decode_context, p.running_s)

    @property
    def has_model(self) -> bool:
        """Whether there is a model of the device."""
        return self._model is not None

    def observe_decode(self, n: int, context: int, seconds: float) -> float:
        """Learn from a pass that decoded `n` sequences, which held `context` tokens; what `unlearn` wants to know."""
        return self._correct(0, seconds / self._decode_seconds(n, context))

    def unlearn(self, forgotten: float) -> None:
        """The last pass that only decoded was not observed: `observe_decode` returned `forgotten` for it."""
        last = self._last[0]
        last.pop()
        last.appendleft(forgotten)
        self._ratio[0] = sum(last) / LAST

    def _decode_seconds(self, n: int, context: int) -> float:
        """What the model says of a pass that only decodes; the same is often asked before and after it ran."""
        if self._decodes != (n, context):
            assert self._model is not None  # else nobody asks
            self._decodes, self._decodes_s = (n, context), self._model((), n, context)
        return self._decodes_s

    def _correct(self, kind: int, ratio: float) -> float:
        """A pass of that kind took `ratio` times what the model said; the oldest ratio, which is forgotten."""
        last = self._last[kind]
        forgotten = last[0]
        last.append(min(max(ratio, 1 / TRUSTED), TRUSTED))
        self._ratio[kind] = sum(last) / LAST
        return forgotten

    def _learnt(self, kind: int, tokens: int) -> float | None:
        sizes, known = self._sizes[kind], self._seconds[kind]
        if not sizes:
            return None
        tokens = _rounded(tokens)
        at = bisect_left(sizes, tokens)
        if at == len(sizes):
            return known[sizes[-1]] * tokens / sizes[-1]
        if at == 0 or sizes[at] == tokens:
            return known[sizes[at]]
        low, high = sizes[at - 1], sizes[at]
        return known[low] + (known[high] - known[low]) * (tokens - low) / (high - low)


def _rounded(tokens: int) -> int:
    """`tokens` to three binary digits, so that as few sizes are kept as matter."""
    step = 1 << max(0, tokens.bit_length() - 3)
    return tokens // step * step
