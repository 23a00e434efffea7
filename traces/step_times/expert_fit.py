"""The model t = base + sum_e f(m_e), fitted to tables of evenly spread tokens or to routed layers of real passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qllm.traces.step_times.file_format import TimingError
from qllm.traces.step_times.interpolate import by_tokens, isotonic

if TYPE_CHECKING:
    import pandas as pd

#: tokens of each expert in a layer of one pass, int[experts], or of several, int[passes, experts]
Counts = Sequence[int] | np.ndarray
FITS = 4  # one after another, each with errors relative to what the one before predicts
OUTLIER = 0.25  # a layer further than this from one fit does not take part in the next


@dataclass(frozen=True)
class ExpertFit:
    """base and f, fitted to measured layers."""

    base: float  # seconds a layer call
    tokens: np.ndarray  # sizes of f, int64[n], ascending
    seconds: np.ndarray  # f at these sizes, float64[n], non-decreasing
    errors: np.ndarray  # predicted / measured - 1 of every layer given, float64[layers]
    kept: np.ndarray  # whether a layer took part in the fit, bool[layers]
    measured: np.ndarray  # whether a size was measured, bool[n]; False: the edge of a stair between two that were

    def predicted(self, counts: Sequence[Counts]) -> np.ndarray:
        """Seconds of layers, float64[layers], for `counts` as those of `fit_routed`."""
        passes, starts = _stacked(counts)
        seconds: np.ndarray = self.base + _means(by_tokens(self.tokens, self.seconds, passes).sum(axis=1), starts)
        return seconds


def balanced_counts(tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Tokens per expert when `tokens` x `top_k` assignments are spread as evenly as can be, int64[experts]."""
    share, rest = divmod(tokens * top_k, experts)
    return np.array([share + 1] * rest + [share] * (experts - rest))


def fit_balanced(layer: pd.Series, experts: int, top_k: int, tile: int | None = None) -> ExpertFit:
    """base and f from a table of evenly spread tokens (seconds of a `layer` by tokens). TimingError for too few rows.

    Rows of at most `experts` assignments lie on a line, base + active x f(1): least squares on relative errors. All
    others give f(m) = (t - base) / experts, then made non-decreasing. The kernel reads the weights once per `tile`
    rows: with it, f steps up after each multiple instead of rising between two measured sizes.
    """
    tokens = layer.index.to_numpy(dtype=np.int64)
    seconds = layer.to_numpy(dtype=float)
    assigned = tokens * top_k
    few = assigned <= experts
    if few.sum() < 2:
        raise TimingError(f"the base needs 2 rows of at most {experts} assignments (tokens x top_k), got {few.sum()}")
    kept = np.ones(len(tokens), dtype=bool)
    base, one, kept[few] = _line(assigned[few], seconds[few])
    sizes = np.concatenate([[1], assigned[~few] // experts])
    times = np.concatenate([[one], (seconds[~few] - base) / experts])
    sizes, at = np.unique(sizes, return_index=True)
    if len(sizes) < 2:
        raise TimingError(f"f needs a row of more than {experts} assignments (tokens x top_k), got none")
    f = isotonic(times[at])
    measured = np.ones(len(sizes), dtype=bool)
    if tile is not None:
        sizes, f, measured = _stairs(sizes, f, tile)
    spread = np.array([balanced_counts(int(n), top_k, experts) for n in tokens])
    predicted = base + by_tokens(sizes, f, spread).sum(axis=1)
    return ExpertFit(base, sizes, f, predicted / seconds - 1, kept, measured)


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


def fit_routed(
    seconds: Sequence[float],
    counts: Sequence[Counts],
    weights: Sequence[float] | None = None,
) -> ExpertFit:
    """base and f >= 0 by least squares on relative errors. TimingError without two layers with tokens.

    `seconds` are of layers whose experts ran as one group; `counts` their tokens per expert (of several passes:
    `seconds` is the mean). f is piecewise linear between sizes that grow by half. Errors are relative to the fit
    before, not to the measured time: else too fast a layer counts for more, and the fit lies below the mean by twice
    the variance.
    """
    times = np.asarray(seconds, dtype=float)
    rows, starts = _stacked(counts)
    if len(times) < 2 or rows.max(initial=0) < 1:
        raise TimingError(f"the times of experts need at least 2 measured layers with tokens, got {len(times)}")
    knots = _knots(int(rows.max()))
    active = (rows > 0).sum(axis=1)
    ramps = [np.clip((rows - a) / (b - a), 0, 1).sum(axis=1) for a, b in itertools.pairwise(knots)]
    design = np.stack([np.ones(len(times)), *(_means(column, starts) for column in (active, *ramps))], axis=1)
    kept, scale = np.ones(len(times), dtype=bool), times
    shares = np.ones(len(times)) if weights is None else np.asarray(weights, dtype=float)
    for _ in range(FITS):
        factor = (shares / scale)[kept]
        x = nonnegative(design[kept] * factor[:, None], times[kept] * factor)
        predicted = design @ x
        scale = np.maximum(predicted, 1e-3 * times)  # 0 where a layer without tokens took time
        inside = np.abs(times / scale - 1) <= OUTLIER
        if inside.sum() < max(2, 0.5 * len(times)):
            break
        kept = inside
    measured = np.ones(len(knots), dtype=bool)
    return ExpertFit(float(x[0]), np.array(knots), np.cumsum(x[1:]), predicted / times - 1, kept, measured)


def _stacked(counts: Sequence[Counts]) -> tuple[np.ndarray, np.ndarray]:
    """The passes of all layers, int64[passes, experts], and where those of each layer begin, int64[layers]."""
    passes = [np.atleast_2d(np.asarray(one, dtype=np.int64)) for one in counts]
    return np.concatenate(passes or [np.empty((0, 0), np.int64)]), np.cumsum([0, *map(len, passes)])[:-1]


def _means(of_passes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Each layer's mean over its passes, float64[layers]."""
    return np.add.reduceat(of_passes, starts) / np.diff([*starts, len(of_passes)])


def _knots(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `largest`, which is the last (2 where it is 1: f needs two sizes)."""
    knots = [1, 2]
    while knots[-1] < largest:
        step = knots[-1]
        knots.append(step + step // 2 if step & (step - 1) == 0 else step + step // 3)
    if len(knots) > 2:
        knots[-1] = largest
    return knots


def nonnegative(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 that minimises |design x - target| (Lawson and Hanson 1974, chapter 23), float64[columns]."""
    n = design.shape[1]
    gram, right = design.T @ design, design.T @ target
    x, free = np.zeros(n), np.zeros(n, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(right).max()))
    for _ in range(10 * n):
        gradient = right - gram @ x
        candidates = np.where(free, -np.inf, gradient)
        best = int(candidates.argmax())
        if candidates[best] <= tolerance:
            break
        free[best] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(design[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                x = trial
                break
            falling = free & (trial <= 0)
            share = x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)
            x = x + share.min() * (trial - x)
            free &= x > 1e-15
            x[~free] = 0.0
    return x
