"""Comparison as statistics: differences between two policies on the same seeds, with a confidence interval.

Policies of a sweep see the same requests at the same seed, so what a seed brings (many long prompts, a burst) is in
both values and cancels in their difference. For each seed s the metric is worked out for either policy, and

    difference  mean over the seeds of d_s = value of the one - value of the other
    low, high   difference -+ t(n - 1) * standard deviation of d_s / sqrt(n)

with Student's t at 97.5 %: the 95 % interval of the paired t test for n seeds (Law, Simulation Modeling and Analysis,
section 10.2.1). It needs two seeds; with two or three it is wide, as it should be. It holds for seeds whose
differences are about normal, which means and percentiles of hundreds of requests are. A single interval is right in 95
of 100 cases: of a hundred intervals some five miss, so take one that barely leaves out 0 for what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from qllm.experiment.results import Results

#: Columns of the summary that are compared.
METRICS = (
    "ttft_mean_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p99_s",
    "turnaround_mean_s",
    "slo_attainment",
    "goodput_rps",
    "throughput_rps",
)
#: What is said where no interval can be given.
ONE_SEED = "One seed says nothing about chance: no intervals. Give at least two, for example seeds: 5."


class Interval(NamedTuple):
    """A mean, its 95 % confidence interval (nan with fewer than two values), and how many values."""

    mean: float
    low: float
    high: float
    n: int


@cache
def student_t(df: int, share: float = 0.95) -> float:
    """The t within which `share` of Student's distribution with `df` (>= 1) degrees of freedom lies, around 0."""
    low, high = 0.0, 1.0
    while _within(high, df) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < share else (low, middle)
    return (low + high) / 2


def _within(t: float, df: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, df, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means and 95 % intervals by Student's t of independent values along the last axis, one a seed.

    Args:
        values: float64[..., seeds]; those that are nan are left out.

    Returns:
        mean, low, high and the number of values, [...] each. Mean: nan for none; low and high: nan for fewer than two.
    """
    given = ~np.isnan(values)
    n = given.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(given, values, 0.0).sum(axis=-1) / n
        apart = np.where(given, values - mean[..., None], 0.0)
        t = np.vectorize(lambda count: student_t(count - 1) if count > 1 else math.nan, otypes=[float])(n)
        half = t * np.sqrt((apart**2).sum(axis=-1) / (n - 1) / n)
    return mean, mean - half, mean + half, n


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """`intervals` of one row of values."""
    mean, low, high, n = intervals(np.asarray(values, dtype=float))
    return Interval(float(mean), float(low), float(high), int(n))


def differences(results: Results, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Compare every two policies of a sweep at each point, class by class, on the seeds that both have.

    Args:
        results: What a sweep gave.
        metrics: Columns of the summary.

    Returns:
        A row per point, class, metric and two policies: the swept keys, class, metric, policy, minus, difference, low,
        high, seeds. Metrics that no seed has are left out.
    """
    point = [name for name in results.point_columns if name != "policy"]
    titles = [policy.title for policy in results.config.policies]
    return paired_rows(results.per_seed, "policy", titles, [*point, "class"], metrics)


def paired_rows(
    per_seed: pd.DataFrame, by: str, names: Sequence[str], at: Sequence[str], metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Compare every two `names` of the column `by`, the later minus the earlier, at each value of the columns `at`.

    Args:
        per_seed: A row per seed, point, class and name: the columns `by`, `at`, seed and `metrics`.
        by: What differs between the two that are compared.
        names: In the order wanted.
        at: What is the same for both.
        metrics: Columns that are compared.

    Returns:
        As `differences`, with `by` in place of policy.
    """
    parts = []
    for key, here in per_seed.groupby(list(at), sort=False, observed=True, dropna=False):
        there = {str(name): table.set_index("seed") for name, table in here.groupby(by, sort=False, observed=True)}
        known = [name for name in names if name in there]
        seeds = sorted(set(here["seed"]))
        pairs = [(minus, name) for minus, name in combinations(range(len(known)), 2)]
        if not pairs:
            continue
        values = np.array([there[name].reindex(seeds)[list(metrics)].to_numpy(dtype=float) for name in known])
        earlier, later = np.array(pairs).T
        difference = (values[later] - values[earlier]).transpose(2, 0, 1)  # metrics, pairs, seeds
        mean, low, high, n = intervals(difference)
        table = pd.DataFrame(
            {
                **{name: [value] * mean.size for name, value in zip(at, key, strict=True)},
                "metric": np.repeat(list(metrics), len(pairs)),
                by: np.tile([known[k] for k in later], len(metrics)),
                "minus": np.tile([known[k] for k in earlier], len(metrics)),
                **{"difference": mean.ravel(), "low": low.ravel(), "high": high.ravel(), "seeds": n.ravel()},
            }
        )
        parts.append(table[table["seeds"] > 0])
    columns = [*at, "metric", by, "minus", "difference", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def in_words(metric: str, difference: float, low: float, high: float) -> str:
    """'-12 ms [-15, -9]': a difference with its interval, in a unit that reads well."""
    largest = max(abs(one) for one in (difference, low, high) if not math.isnan(one))
    factor, unit = 1.0, ""
    if metric.endswith("_s"):
        factor, unit = (1e3, " ms") if largest < 1 else (1.0, " s")
    elif metric.endswith("_rps"):
        unit = " /s"
    elif metric.startswith("slo"):
        factor, unit = 100.0, " points"
    digits = max(0, 1 - math.floor(math.log10(largest * factor))) if largest * factor > 0 else 0
    told = f"{_signed(difference * factor, digits)}{unit}"
    if math.isnan(low):
        return told
    return f"{told} [{_signed(low * factor, digits)}, {_signed(high * factor, digits)}]"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text
