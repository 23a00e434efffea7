"""How a machine's speed changes over time, from kinds of passes that were measured again and again.

A visit says two things: how long its kind of pass takes, and how fast the machine was just then. With many kinds, each
visited at many times, the two can be told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

WINDOW_S = 2.0  # standard deviation of the weights in time: a shared machine's speed changes within seconds
SWEEPS = 4  # of telling kinds and times apart; each leaves about a tenth of what the one before got wrong
AT_ONCE = 1 << 22  # weights in memory, 32 MiB
STALLED = 3.0  # times the median of its kind: the machine stood still, which says nothing about other passes


def slowness(at: np.ndarray, kinds: Iterable[object], seconds: np.ndarray) -> np.ndarray:
    """How much longer the passes took than passes of their kind do on average, because of when they were measured.

    at: float64[visits], seconds on any clock; kinds: what was measured; seconds: float64[visits]. Returns
    float64[visits], 1 on average: over all visits, neighbours in time weigh in by a Gaussian of WINDOW_S.
    """
    names: dict[object, int] = {}
    kind = np.array([names.setdefault(name, len(names)) for name in kinds])
    medians = np.array([np.median(seconds[kind == number]) for number in range(len(names))])
    times = np.minimum(seconds, STALLED * medians[kind])
    slow = np.ones(len(times))
    for _ in range(SWEEPS):
        level = np.bincount(kind, times / slow) / np.bincount(kind)
        slow = smooth(at, times / level[kind], at)
        slow /= slow.mean()
    return slow


def slowness_by_size(at: np.ndarray, kinds: Sequence[object], seconds: np.ndarray, small: np.ndarray) -> np.ndarray:
    """`slowness` of `small` passes (bool[visits]) and of the others, each for themselves."""
    slow = np.ones(len(seconds))
    for some in (small, ~small):
        if some.any():
            slow[some] = slowness(at[some], [kinds[i] for i in np.flatnonzero(some).tolist()], seconds[some])
    return slow


def smooth(at: np.ndarray, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Means of `values` (float64[n], measured at the times `at`) around the times `where`, float64[where]."""
    means = []
    for part in np.array_split(where, 1 + len(where) * len(at) // AT_ONCE):
        apart = ((part[:, None] - at[None, :]) / WINDOW_S) ** 2
        weights = np.exp(-0.5 * (apart - apart.min(axis=1, keepdims=True)))  # of those far from all, the closest count
        means.append((weights @ values) / weights.sum(axis=1))
    return np.concatenate(means)
