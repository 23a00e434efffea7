"""Means, percentiles and bands of values of which some may be missing (nan)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

_DRAWS = 1000  #: of the seeds, for a band


def mean(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    n = len(values) - np.isnan(values).sum()
    return float(np.nansum(values) / n) if n else float("nan")


def percentile(values: pd.Series | np.ndarray, percent: float) -> float:
    """Linear interpolation between order statistics over the values that are not nan; nan if there are none."""
    return percentiles(values, (percent,))[0]


def percentiles(values: pd.Series | np.ndarray, percents: Sequence[float]) -> list[float]:
    """`percentile` for each of `percents`."""
    given = np.asarray(values, dtype=float)
    present = given[~np.isnan(given)]
    found: list[float] = np.percentile(present, percents).tolist() if len(present) else [float("nan")] * len(percents)
    return found


def bootstrap(seeds: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """95 % band of a statistic of the pooled values: what it is between if the seeds are drawn again, with replacement.

    A mean's band lies within the means of single seeds, so a positive metric has a positive band. With few seeds it is
    too narrow.

    Args:
        seeds: The values of each seed, any[n, ...]; they are pooled along the first axis.
        statistic: Works out one number from such an array; nan where it cannot.

    Returns:
        (low, high), the 2.5th and 97.5th percentile; (nan, nan) for fewer than two seeds with values.
    """
    given = [values for values in seeds if len(values)]
    n = len(given)
    if n < 2:
        return float("nan"), float("nan")
    combinations, times = _drawn_again(n)
    found = [
        statistic(np.concatenate([values for values, k in zip(given, row, strict=True) for _ in range(k)]))
        for row in combinations
    ]
    low, high = np.nanpercentile(np.repeat(found, times), [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _drawn_again(n: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each of `n` seeds is drawn if they are drawn again, int[combinations, n], and how often that occurs."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_DRAWS)
    combinations, times = np.unique(drawn, axis=0, return_counts=True)
    return combinations, times
