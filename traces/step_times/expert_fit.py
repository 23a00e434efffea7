"""The expert-layer model t = base + sum_e f(m_e), fitted to measured MoE layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qllm.traces.step_times.file_format import TimingError
from qllm.traces.step_times.interpolate import by_tokens, isotonic

OUTLIER = 0.25  # a row further than this from the line through the others does not take part in the base


@dataclass(frozen=True)
class ExpertFit:
    """base: seconds a layer call; tokens int64[n], seconds float64[n]: f; measured bool[n]: False for a stair's edge.

    error_mean, error_max: relative error on the rows of the fit; dropped: rows (tokens a layer) that it left out.
    """

    base: float
    tokens: np.ndarray
    seconds: np.ndarray
    measured: np.ndarray
    error_mean: float
    error_max: float
    dropped: tuple[int, ...]

    def layer(self, counts: np.ndarray) -> float:
        """Seconds of one MoE layer whose experts get `counts` tokens (int[experts])."""
        return self.base + float(by_tokens(self.tokens, self.seconds, counts).sum())


def balanced_counts(tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Tokens per expert when `tokens` x `top_k` assignments are spread as evenly as can be, int64[experts]."""
    share, rest = divmod(tokens * top_k, experts)
    return np.array([share + 1] * rest + [share] * (experts - rest))


def fit_balanced(layer: pd.Series, experts: int, top_k: int, tile: int | None = None) -> ExpertFit:
    """Fit base and f to a table of evenly spread tokens: `layer` is seconds by number of tokens.

    Rows with at most `experts` assignments have one token in each of tokens x top_k experts, so their times lie on a
    line: base + active x f(1), fitted by least squares on relative errors. From every other row,
    f(m) = (t - base) / experts; then f is made non-decreasing.

    tile: rows of one block of the kernel. The kernel passes over an expert's weights once a block, so f is made to step
    up after each multiple of `tile` instead of rising between two measured sizes. TimingError without two rows of few
    assignments.
    """
    tokens = layer.index.to_numpy(dtype=np.int64)
    seconds = layer.to_numpy(dtype=float)
    assigned = tokens * top_k
    few = assigned <= experts
    if few.sum() < 2:
        raise TimingError(f"the base needs 2 rows of at most {experts} assignments (tokens x top_k), got {few.sum()}")
    base, one, kept = _line(assigned[few], seconds[few])
    full = assigned > experts
    sizes = np.concatenate([[1], assigned[full] // experts])
    times = np.concatenate([[one], (seconds[full] - base) / experts])
    sizes, at = np.unique(sizes, return_index=True)
    if len(sizes) < 2:
        raise TimingError(f"f needs a row of more than {experts} assignments (tokens x top_k), got none")
    f = isotonic(times[at])
    measured = np.ones(len(sizes), dtype=bool)
    if tile is not None:
        sizes, f, measured = _stairs(sizes, f, tile)
    spread = np.array([balanced_counts(int(n), top_k, experts) for n in tokens])
    predicted = base + by_tokens(sizes, f, spread).sum(axis=1)
    errors = np.abs(predicted / seconds - 1)
    dropped = tuple(int(n) for n in tokens[few][~kept])
    return ExpertFit(base, sizes, f, measured, float(errors.mean()), float(errors.max()), dropped)


def _line(active: np.ndarray, seconds: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(base, f(1), rows kept): least squares on relative errors, without rows far off the median line (Theil-Sen)."""
    pairs = list(itertools.combinations(range(len(active)), 2))
    slope = float(np.median([(seconds[j] - seconds[i]) / (active[j] - active[i]) for i, j in pairs]))
    line = np.median(seconds - slope * active) + slope * active
    kept = np.abs(line / seconds - 1) <= OUTLIER
    if kept.sum() < 2:
        kept = np.ones(len(active), dtype=bool)
    design = np.stack([np.ones(kept.sum()), active[kept]], axis=1) / seconds[kept, None]
    base, one = np.linalg.lstsq(design, np.ones(kept.sum()), rcond=None)[0]
    if base < 0:  # a base below 0 is noise: the best line through the origin instead
        base, one = 0.0, 1 / np.mean(active[kept] / seconds[kept])
    return float(base), float(one), kept


def _stairs(sizes: np.ndarray, f: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes and f with the edges of every block between measured sizes, and which of them are measured."""
    points = {int(m): (float(seconds), True) for m, seconds in zip(sizes, f, strict=True)}
    for (a, fa), (b, fb) in itertools.pairwise(zip(sizes.tolist(), f.tolist(), strict=True)):
        low, high = -(-a // tile), -(-b // tile)
        for blocks in range(low, high):
            share = (blocks - low) / (high - low), (blocks + 1 - low) / (high - low)
            points.setdefault(blocks * tile, (fa + share[0] * (fb - fa), False))
            points.setdefault(blocks * tile + 1, (fa + share[1] * (fb - fa), False))
    order = sorted(points)
    return np.array(order), np.array([points[m][0] for m in order]), np.array([points[m][1] for m in order])
