"""Which experts the tokens of a pass go to.

Tokens choose `top_k` different experts each, in proportion to the popularity of the experts in their layer. A pool of
such tokens is drawn once; a pass takes a run of consecutive tokens from it at a random place, whose counts per expert
are a difference of two rows of a running sum. For passes larger than the pool the counts are drawn from the normal
limit of the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_POOL_CELLS = 1 << 21  # tokens x layers x experts in the pool: 2 x 2^21 x 2 bytes = 8 MiB
_NOISES = 64  # different draws of passes larger than the pool
_NEAREST = 4  # recorded passes to choose from, at least
_BLOCK = 1 << 12  # random numbers drawn at a time


class RecordedRouting:
    """Routing that was recorded: each pass gets what the real engine's tokens chose in it.

    Args:
        counts: Tokens per expert of each pass in the order of the launches, int[layers, experts] each. There must be
            as many as passes are launched.
    """

    pooled = False

    def __init__(self, counts: Sequence[np.ndarray]):
        self._counts = counts
        self._next = 0

    def draw(self) -> int:
        """Return the number of the next pass."""
        self._next += 1
        return self._next - 1

    def place(self, tokens: int, draw: int) -> int:
        """Return `draw`: no two passes are known to have the same counts."""
        return draw

    def counts(self, tokens: int, draw: int) -> np.ndarray:
        """Return the tokens per expert of pass number `draw`, int[layers, experts].

        Raises:
            IndexError: So many passes were not recorded.
        """
        return np.asarray(self._counts[draw])


class ResampledRouting:
    """Routing like that of recorded passes.

    A pass gets the counts of one that was as large, or of one nearly as large with its counts in proportion. Unlike
    `Routing`, it keeps that the tokens of one text go to the same experts.

    Args:
        counts: Tokens per expert of recorded passes, int[MoE layers, experts] each.
        top_k: Experts that each token chooses.
        layers: Layers of the model. Those beyond the recorded ones repeat the last.
        seed: Of the choice among passes.

    Raises:
        ValueError: No passes were recorded.
    """

    pooled = True

    def __init__(self, counts: Sequence[np.ndarray], top_k: int, layers: int, seed: int = 0):
        if not len(counts):
            raise ValueError("no passes were recorded")
        tokens = [int(np.asarray(c)[0].sum()) // top_k for c in counts]
        order = np.argsort(tokens, kind="stable")
        self._sizes = np.array(tokens)[order]
        self._counts = [np.asarray(counts[i]) for i in order]
        self._layer = np.minimum(np.arange(layers), len(self._counts[0]) - 1)
        self._rng = np.random.default_rng((seed, 2))

    def draw(self) -> int:
        """Return a random integer below 2^30."""
        return int(self._rng.integers(1 << 30))

    def place(self, tokens: int, draw: int) -> int:
        """Return `draw`: few passes have the same counts."""
        return draw

    def counts(self, tokens: int, draw: int) -> np.ndarray:
        """Return the tokens per expert of a pass of `tokens` tokens, int64[layers, experts].

        The same `draw` gives the same counts.
        """
        first, last = (int(np.searchsorted(self._sizes, tokens, side)) for side in ("left", "right"))
        if last - first < _NEAREST:  # few as large: some of the neighbours too
            first = max(0, min(first - (_NEAREST - (last - first)) // 2, len(self._sizes) - _NEAREST))
            last = min(first + _NEAREST, len(self._sizes))
        at = first + draw % (last - first)
        counts = self._counts[at][self._layer]
        if self._sizes[at] == tokens:
            return counts
        scaled: np.ndarray = np.minimum(np.rint(counts * (tokens / self._sizes[at])), tokens)
        return scaled.astype(np.intp)


class Routing:
    """Draws of tokens per expert; the same seed gives the same draws.

    Choosing in proportion to popularity without replacement flattens a very skewed table somewhat: no expert can get
    more than one choice of a token.

    Args:
        popularity: Share of tokens routed to each expert, float[layers, experts]; each row sums to 1.
        top_k: Experts that each token chooses.
        seed: Of the draws.
        replica: Of several GPUs the one that draws: each gets other draws from the same tokens.
    """

    pooled = True  # draws may be kept and used again for passes of the same size

    def __init__(self, popularity: np.ndarray, top_k: int, seed: int = 0, replica: int = 0):
        self.layers, self.experts = popularity.shape
        self.share: np.ndarray = np.minimum(popularity * top_k, 1.0)  # of the tokens, at each expert
        self._deviation: np.ndarray = np.sqrt(self.share * (1 - self.share))
        self.size, self._sums, self._noise = _pool(popularity.tobytes(), popularity.shape, top_k, seed)
        self._rng = np.random.default_rng((seed, 1, replica) if replica else (seed, 1))
        self._draws: list[int] = []
        self._deviations: dict[int, tuple[np.ndarray, float, float]] = {}  # by noise, with the least and the most
        self._shares = float(self.share.min()), float(self.share.max())

    def draw(self) -> int:
        """Return a random integer below 2^30."""
        return (self._draws or self.ahead()).pop()

    def ahead(self) -> list[int]:
        """Return what is drawn next, the last of them first; who takes one removes it."""
        if not self._draws:
            self._draws = self._rng.integers(1 << 30, size=_BLOCK).tolist()
        return self._draws

    def place(self, tokens: int, draw: int) -> int:
        """Return the least draw that gives a pass of `tokens` tokens the same counts as `draw`."""
        return draw % (self.size if tokens <= self.size else _NOISES)

    def counts(self, tokens: int, draw: int) -> np.ndarray:
        """Return the tokens per expert of a pass of `tokens` tokens, int64[layers, experts].

        The same `draw` gives the same counts.
        """
        if tokens <= self.size:
            at = draw % self.size
            chosen: np.ndarray = self._sums[at + tokens] - self._sums[at]
            return chosen.astype(np.intp).reshape(self.share.shape)
        noise, root = draw % len(self._noise), math.sqrt(tokens)
        if noise not in self._deviations:
            deviations = self._deviation * self._noise[noise]
            self._deviations[noise] = deviations, float(deviations.min()), float(deviations.max())
        deviations, least, most = self._deviations[noise]
        drawn: np.ndarray = deviations * root
        drawn += tokens * self.share
        drawn += 0.5
        # Counts lie within 0 and `tokens` mostly, and no rounding puts one beyond what the extremes come to.
        if least * root + tokens * self._shares[0] < 0:
            np.maximum(drawn, 0.0, out=drawn)
        if most * root + tokens * self._shares[1] + 0.5 > tokens:
            np.minimum(drawn, tokens, out=drawn)
        return drawn.astype(np.intp)


def binomial(tokens: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """How many of `tokens` go to an expert that gets each with chance `share`: (int64[n] counts, float64[n] chances).

    Counts that hardly ever occur, less than once in a thousand million draws, are left out.
    """
    if not 0 < share < 1:
        return np.array([tokens if share else 0]), np.ones(1)
    mean, far = tokens * share, 7 * math.sqrt(tokens * share) + 7
    counts = np.arange(max(math.floor(mean - far), 0), min(math.ceil(mean + far), tokens) + 1)
    grows = np.log((tokens - counts[:-1]) / counts[1:]) + math.log(share / (1 - share))
    logs = np.cumsum(np.concatenate(([0.0], grows)))
    chances = np.exp(logs - logs.max())
    chances /= chances.sum()
    often = chances > 1e-9
    return counts[often], chances[often]


@lru_cache(maxsize=8)
def _pool(data: bytes, shape: tuple[int, int], top_k: int, seed: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(tokens in the pool, uint16[2 tokens + 1, layers * experts] running counts of the pool twice over, noise)."""
    layers, experts = shape
    popularity = np.frombuffer(data).reshape(shape)
    rng = np.random.default_rng((seed, 0))
    size = int(np.clip(_POOL_CELLS // popularity.size, 256, 4096))
    # the k smallest of exponentials over popularity: a draw without replacement in proportion to popularity
    with np.errstate(divide="ignore"):
        score = rng.standard_exponential((size, layers, experts), dtype=np.float32) / popularity.astype(np.float32)
    if top_k < experts:
        chosen = np.argpartition(score, top_k, axis=-1)[..., :top_k]
    else:
        chosen = np.broadcast_to(np.arange(experts), score.shape)
    counts = np.zeros((2 * size + 1, layers, experts), dtype=np.uint16)
    counts[np.arange(1, size + 1)[:, None, None], np.arange(layers)[None, :, None], chosen] = 1
    counts[size + 1 :] = counts[1 : size + 1]  # a run may wrap around
    sums = np.cumsum(counts.reshape(2 * size + 1, -1), axis=0, dtype=np.uint16)
    return size, sums, rng.standard_normal((_NOISES, layers, experts))
