"""How long a pass takes on average over what its tokens may be routed to; `PassCostModel` times one routing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from qllm.traces.step_times.cost_model import PassCostModel

FEW = 128  #: tokens up to which all counts are summed over; beyond, the normal limit is
#: sizes of passes whose experts are worked out; those between lie between
GRID = [*range(FEW // 2 + 1), *(int(FEW / 2 * 1.12**i) for i in range(1, 60))]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(7)


@lru_cache(maxsize=4)
def expected_seconds(steps: PassCostModel) -> ExpectedSeconds:
    """The predictor of a cost model, one for all runs: what it has worked out for some serves the others."""
    return ExpectedSeconds(steps)


class ExpectedSeconds:
    """Seconds of passes by a cost model, each expert having as many tokens as chance gives it on average.

    Args:
        steps: The cost model; its popularity is that of the experts.
    """

    def __init__(self, steps: PassCostModel):
        share = np.minimum(steps.popularity * steps.timings.top_k, 1.0)
        self._share, self._experts_alike = np.unique(np.round(share, 4), return_counts=True)
        self._steps = steps
        self._experts: dict[int, float] = {}
        self._layers = steps.layers / len(steps.popularity)  # that each row of the popularity stands for

    def __call__(self, chunks: Sequence[tuple[int, int]], n_decode: int, context: int) -> float:
        """Seconds of a pass with chunks of prompts, (new tokens, tokens cached before), and `n_decode` that decode."""
        steps = self._steps
        if not chunks:
            return steps.decode_total(n_decode, context) + self.experts(n_decode)
        tokens = n_decode
        for new, _ in chunks:
            tokens += new
        cost = steps.cost([(None, new, cached) for new, cached in chunks], n_decode, context, n_decode + len(chunks))
        launches = steps.layers * (cost.n_groups - 1) * cost.group_launch_s
        return steps.total(cost, self.experts(tokens) + launches)

    def experts(self, tokens: int) -> float:
        """Seconds of the experts of all layers for `tokens` tokens, without launches of further groups."""
        known = self._experts.get(tokens)
        if known is not None:
            return known
        at = bisect_left(GRID, tokens)
        if at < len(GRID) and GRID[at] == tokens:
            found = self._worked_out(tokens)
        else:
            low, high = (GRID[at - 1], GRID[at]) if at < len(GRID) else (GRID[-2], GRID[-1])
            below, above = self.experts(low), self.experts(high)
            found = below + (above - below) * (tokens - low) / (high - low)
        self._experts[tokens] = found
        return found

    def _worked_out(self, tokens: int) -> float:
        if not tokens:
            return 0.0
        q = self._share
        if tokens <= FEW:
            counts = np.arange(tokens + 1)
            ways = np.array(
                [math.lgamma(tokens + 1) - math.lgamma(k + 1) - math.lgamma(tokens - k + 1) for k in counts]
            )
            inside = np.clip(q, 1e-12, 1 - 1e-12)[:, None]
            chances = np.exp(ways + counts * np.log(inside) + (tokens - counts) * np.log1p(-inside))
            each = chances @ self._steps.experts(counts)
        else:
            mean, spread = tokens * q, np.sqrt(tokens * q * (1 - q))
            counts = np.clip(np.rint(mean[:, None] + spread[:, None] * NODES), 0, tokens).astype(np.int64)
            each = self._steps.experts(counts) @ WEIGHTS / WEIGHTS.sum()
        return float(each @ self._experts_alike) * self._layers
