"""What a request's penalties and biases do to its logits: of few tokens, those that it has seen or that are biased."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from qllm.executor.sampling.params import SamplingParams

FIRST = 64  # tokens that there is room for at first


class Shifts:
    """The tokens whose logits change, and how: kept up with the request's tokens one by one.

    A logit x becomes y - taken, with y = (x + bias) / repetition where x + bias is above 0, else (x + bias) *
    repetition; all in float32, so that a CPU and a device come to the same bits.

    Args:
        params: of the request.
        prompt: its prompt's token ids.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]):
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._repetition = params.repetition_penalty
        self._counts = bool(self._presence or self._frequency or self._repetition != 1)
        self._place: dict[int, int] = {}
        self._generated: list[int] = []  # how often each token was generated
        self._ids = np.empty(FIRST, dtype=np.int64)
        self._factors = np.empty((3, FIRST), dtype=np.float32)
        biases = params.logit_bias or {}
        self._add([*biases])
        self._factors[0, : len(biases)] = [*biases.values()]
        if self._repetition != 1:
            seen = set(prompt)
            self._add([token for token in seen if token not in self._place])
            self._factors[1, [self._place[token] for token in seen]] = self._repetition

    @property
    def ids(self) -> np.ndarray:
        """The token ids, each once, int64 `[tokens]`."""
        return self._ids[: len(self._place)]

    @property
    def factors(self) -> np.ndarray:
        """Their bias, repetition penalty and what is taken off, float32 `[3, tokens]`."""
        return self._factors[:, : len(self._place)]

    def follow(self, generated: Iterable[int]) -> None:
        """These tokens were generated since."""
        if not self._counts:
            return
        for token in generated:
            if token not in self._place:
                self._add([token])
            place = self._place[token]
            self._generated[place] += 1
            self._factors[1, place] = self._repetition
            self._factors[2, place] = self._presence + self._frequency * self._generated[place]

    def _add(self, tokens: list[int]) -> None:
        """Make places for tokens that have none."""
        n, needed = len(self._place), len(self._place) + len(tokens)
        if needed > len(self._ids):
            more = max(needed, 2 * n) - len(self._ids)
            self._ids = np.concatenate([self._ids, np.empty(more, dtype=np.int64)])
            self._factors = np.concatenate([self._factors, np.empty((3, more), dtype=np.float32)], axis=1)
        self._ids[n:needed] = tokens
        self._factors[:, n:needed] = [[0.0], [1.0], [0.0]]
        self._place.update(zip(tokens, range(n, needed), strict=True))
        self._generated += [0] * len(tokens)

    def apply(self, row: np.ndarray) -> None:
        """Change a row of logits, float32 `[vocab]`, in place."""
        ids, (bias, repetition, taken) = self.ids, self.factors
        with np.errstate(all="ignore"):  # rows of inf or NaN
            found = row[ids] + bias
            row[ids] = np.where(found > 0, found / repetition, found * repetition) - taken
