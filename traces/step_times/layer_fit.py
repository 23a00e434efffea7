"""The expert-layer model t = base + sum_e f(m_e), fitted to measured layers of any routing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qllm.traces.step_times.file_format import TimingError
from qllm.traces.step_times.interpolate import by_tokens

#: tokens of each expert in a layer of one pass, int[experts], or of several, int[passes, experts]
Counts = Sequence[int] | np.ndarray
FITS = 4  # one after another, each with errors relative to what the one before predicts
OUTLIER = 0.25  # a layer further than this from one fit does not take part in the next


@dataclass(frozen=True)
class LayerFit:
    """base: seconds; tokens int64[n], seconds float64[n]: f, non-decreasing.

    errors: float64[layers], predicted / measured - 1 of every layer given; kept: bool[layers], those that were fitted.
    """

    base: float
    tokens: np.ndarray
    seconds: np.ndarray
    errors: np.ndarray
    kept: np.ndarray

    def predicted(self, counts: Sequence[Counts]) -> np.ndarray:
        """Seconds of layers, float64[layers], for `counts` as those of `fit_routed`."""
        passes, starts = _stacked(counts)
        return self.base + _means(by_tokens(self.tokens, self.seconds, passes).sum(axis=1), starts)


def fit_routed(
    seconds: Sequence[float],
    counts: Sequence[Counts],
    weights: Sequence[float] | None = None,
) -> LayerFit:
    """Fit base and f by least squares on relative errors, none of them below zero.

    seconds, counts (tokens of each expert; of several passes, where `seconds` is their mean) and weights (of the
    errors; 1 where there are none): one element a measured layer, whose experts ran as one group. f is piecewise linear
    between sizes that grow by half, as far as a size was seen. TimingError without two layers.

    Errors are relative to what the fit before predicts, not to what was measured: relative to that, a layer that was
    measured too fast counts for more than one that was measured too slow, and the fit lies below the mean by twice
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
    errors = predicted / times - 1
    return LayerFit(float(x[0]), np.array(knots), np.cumsum(x[1:]), errors, kept)


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
