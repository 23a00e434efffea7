"""The metrics, one definition for simulator and engine (times in seconds).

For one request, with `arrival` the moment that the open-loop schedule says:

    ttft        first_token - arrival
    tpot        (finish - first_token) / (output_tokens - 1), undefined for one output token
    turnaround  finish - arrival = queueing + running + suspended
    blocking    first_launch - arrival: until a pass with the request in it starts for the first time
    isolated    ttft of the same request alone on an idle device: the physical floor

For a class at one point of a sweep the requests of all seeds are pooled. Percentiles are numpy's linear
interpolation between order statistics. A mean or percentile is taken over the requests that have the value: a
rejected request has none, so read it together with `slo_attainment`, where everything sent counts.

    makespan        last finish - first arrival of a run, all classes; summed over the seeds
    throughput      finished requests of the class / makespan
    slo_attainment  good / sent; good = finished and within every bound of its class (empty for a class without SLO)
    slo_*_met       the same for one of its bounds alone
    goodput         good / makespan
    saturated       whether the queue was still growing when arrivals ended (see `saturated`)
    preemptions     how often a pass with a request of the class in it was suspended, summed over its requests
    evictions       how often a request's KV had to give way, summed over the requests of the class
    cached_share    prompt tokens that the prefix cache had / prompt tokens, of finished requests (empty without one)
    kv_peak         largest share of the KV blocks in use, of all classes, at any moment of any seed
    ttft_mean_lo/hi 95 % band for the mean by `bootstrap` over the seeds (empty with one seed)

Requests that arrive during the warm-up count in none of these but `saturated` and `kv_peak`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qllm.config.schema import Slo, Warmup

#: Columns of summary.csv after policy, rate and class, in order; further swept keys follow at the end.
SUMMARY_COLUMNS = (
    "sent",
    "completed",
    "rejected",
    "saturated",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "ttft_over_isolated_p99",
    "blocking_mean_s",
    "blocking_p99_s",
    "tpot_mean_s",
    "tpot_p50_s",
    "tpot_p95_s",
    "tpot_p99_s",
    "turnaround_mean_s",
    "turnaround_p50_s",
    "turnaround_p95_s",
    "turnaround_p99_s",
    "suspended_mean_s",
    "slo_attainment",
    "slo_ttft_met",
    "slo_ttft_over_isolated_met",
    "slo_tpot_met",
    "slo_e2e_met",
    "goodput_rps",
    "throughput_rps",
    "output_tokens_per_s",
    "preemptions",
    "evictions",
    "cached_share",
    "kv_peak",
    "ttft_mean_lo_s",
    "ttft_mean_hi_s",
)
#: The bounds that an SLO may have: keys of `Slo`, each with its column of the summary.
BOUNDS = {
    "ttft": "slo_ttft_met",
    "ttft_over_isolated": "slo_ttft_over_isolated_met",
    "tpot": "slo_tpot_met",
    "e2e": "slo_e2e_met",
}
#: What `totals` adds up: counts, and what is per second of the makespan that all classes share.
_SUMS = ("sent", "completed", "rejected", "preemptions", "evictions")
_RATES = ("goodput_rps", "throughput_rps", "output_tokens_per_s")
_DRAWS = 1000  #: of the seeds, for a band


def per_request(requests: pd.DataFrame) -> pd.DataFrame:
    """Add ttft_s, tpot_s, turnaround_s, blocking_s and ttft_over_isolated to `requests` (as in requests.parquet)."""
    gaps = (requests["output_tokens"] - 1).where(requests["output_tokens"] > 1)
    ttft = requests["first_token_s"] - requests["arrival_s"]
    return requests.assign(
        ttft_s=ttft,
        tpot_s=(requests["finish_s"] - requests["first_token_s"]) / gaps,
        turnaround_s=requests["finish_s"] - requests["arrival_s"],
        blocking_s=requests["first_launch_s"] - requests["arrival_s"],
        ttft_over_isolated=ttft / requests["isolated_ttft_s"],
    )


def within(requests: pd.DataFrame, slos: Mapping[str, Slo | None]) -> pd.DataFrame:
    """A column per key of `BOUNDS`: 1.0 for a row of `per_request` that finished within it, 0.0 if not, nan without.

    One token meets any TPOT.
    """
    met = {
        "ttft": lambda bound: requests["ttft_s"] <= bound,
        "ttft_over_isolated": lambda bound: requests["ttft_over_isolated"] <= bound,
        "tpot": lambda bound: (requests["tpot_s"] <= bound) | (requests["output_tokens"] == 1),
        "e2e": lambda bound: requests["turnaround_s"] <= bound,
    }
    found = pd.DataFrame(np.nan, index=requests.index, columns=list(BOUNDS))
    finished = requests["finish_s"].notna()
    for name, slo in slos.items():
        mine = requests["class"] == name
        for key in BOUNDS:
            bound = getattr(slo, key, None)
            if bound is not None:
                found.loc[mine, key] = (finished & met[key](bound))[mine].astype(float)
    return found


def good(requests: pd.DataFrame, slos: Mapping[str, Slo | None]) -> pd.Series:
    """1.0 for a row of `per_request` within all its bounds, 0.0 if not, nan without an SLO."""
    return within(requests, slos).min(axis=1)


def saturated(requests: pd.DataFrame) -> bool:
    """Whether the queue of these requests of one class was still growing when arrivals ended, over all seeds.

    The queue is what is in the system when a request arrives: those sent before it, neither finished nor rejected. Its
    growth is its mean over the last quarter of the arrivals - that over the second quarter, summed over the seeds. At a
    load below 1 it comes and goes; with n Poisson arrivals at a load of just 1 it is a random walk, and that growth
    exceeds 1.3 sqrt(n) with a probability of at most 5 %; at a load r above 1 it is (1 - 1/r) n / 2. Growth beyond
    sqrt(2 n) is more than chance. Where all arrive at one instant nothing arrives while others are served: False.
    """
    growth, sent = 0.0, 0
    for _, run in requests[requests["status"] != "rejected"].groupby("seed", sort=False):
        arrival = np.sort(run["arrival_s"].to_numpy())
        n, quarter = len(arrival), len(arrival) // 4
        if quarter and arrival[-1] > arrival[0]:
            finish = np.sort(run["finish_s"].fillna(np.inf).to_numpy())
            ahead = np.arange(n) - np.searchsorted(finish, arrival, side="right")
            growth += ahead[-quarter:].mean() - ahead[n // 2 - quarter : n // 2].mean()
            sent += n
    return bool(growth > np.sqrt(2 * sent))


def after_warmup(requests: pd.DataFrame, warmup: Warmup | None) -> pd.DataFrame:
    """The requests of one run that arrive after the warm-up; the table itself where there is none."""
    if warmup is None:
        return requests
    if warmup.seconds is not None:
        counts = requests["arrival_s"] - requests["arrival_s"].min() >= warmup.seconds
    else:
        counts = requests["arrival_s"].rank(method="first") > round((warmup.share or 0.0) * len(requests), 6)
    kept: pd.DataFrame = requests.loc[counts]
    return kept


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
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_DRAWS)
    combinations, times = np.unique(drawn, axis=0, return_counts=True)
    found = [
        statistic(np.concatenate([values for values, k in zip(given, row, strict=True) for _ in range(k)]))
        for row in combinations
    ]
    low, high = np.nanpercentile(np.repeat(found, times), [2.5, 97.5])
    return float(low), float(high)


def summarise(
    requests: pd.DataFrame,
    slos: Mapping[str, Slo | None],
    coordinates: Sequence[str] = (),
    warmup: Warmup | None = None,
) -> pd.DataFrame:
    """Work out the summary: a row per policy, swept values and class, in order of appearance.

    Args:
        requests: A row per request, as in requests.parquet.
        slos: SLO of each class, in the order wanted. A class without a request still has its row, with sent = 0.
        coordinates: The swept keys.
        warmup: Which requests at the beginning of a run do not count.

    Returns:
        The columns policy, rate, class, `SUMMARY_COLUMNS`, the other swept keys, and of a sweep over timing traces
        `timings_source`.
    """
    others = [name for name in coordinates if name != "rate"]
    others += ["timings_source"] if "timings_source" in requests else []
    point = ["policy", "rate", *others]
    rows: list[dict[str, Any]] = []
    for key, at_point in requests.groupby(point, sort=False, observed=True, dropna=False):
        runs = [after_warmup(run, warmup) for _, run in at_point.groupby("seed", sort=False)]
        values = judged(pd.concat(runs), slos)
        makespan = sum(span(run) for run in runs)
        coordinate = dict(zip(point, key if isinstance(key, tuple) else (key,), strict=True))
        for name in slos:
            row = _summary_row(values[values["class"] == name], makespan)
            row["saturated"] = saturated(at_point[at_point["class"] == name])
            row["kv_peak"] = at_point["kv_peak"].max() if "kv_peak" in at_point else float("nan")
            head = {"policy": coordinate["policy"], "rate": coordinate["rate"], "class": name}
            rows.append({**head, **row, **{other: coordinate[other] for other in others}})
    return pd.DataFrame(rows, columns=["policy", "rate", "class", *SUMMARY_COLUMNS, *others])


def totals(summary: pd.DataFrame) -> pd.DataFrame:
    """Add the classes of a summary up: a row per policy and point, with the columns of `summary` but for `class`.

    Counts and rates are sums. `slo_attainment` and `slo_*_met` are of the requests whose class has such a bound.
    `saturated`: whether one of the classes is; `kv_peak` is of all of them anyway. Times are nan: a mean over requests
    of different kinds says nothing about any of them.
    """
    point = [name for name in summary.columns if name not in SUMMARY_COLUMNS and name != "class"]
    rows: list[dict[str, Any]] = []
    for key, classes in summary.groupby(point, sort=False, observed=True, dropna=False):
        row = dict(zip(point, key if isinstance(key, tuple) else (key,), strict=True))
        row |= {name: int(classes[name].sum()) for name in _SUMS}
        row |= {name: classes[name].sum(min_count=1) for name in _RATES}
        row |= {name: _met(classes, name) for name in ("slo_attainment", *BOUNDS.values())}
        rows.append({**row, "saturated": bool(classes["saturated"].any()), "kv_peak": classes["kv_peak"].max()})
    return pd.DataFrame(rows, columns=[name for name in summary.columns if name != "class"])


def _met(classes: pd.DataFrame, column: str) -> float:
    """The share over all classes that have it, of a share of the requests of each class."""
    given = classes[classes[column].notna()]
    return float(np.average(given[column], weights=given["sent"])) if len(given) else float("nan")


def judged(requests: pd.DataFrame, slos: Mapping[str, Slo | None]) -> pd.DataFrame:
    """`per_request` with the columns of `BOUNDS`, 1.0 where that bound is met, and "good" where all are."""
    values = per_request(requests)
    met = within(values, slos)
    return values.assign(**{column: met[key] for key, column in BOUNDS.items()}, good=met.min(axis=1))


def span(run: pd.DataFrame) -> float:
    """The makespan of one run in seconds: last finish - first arrival of any class; 0 where nothing finished."""
    seconds = float(run["finish_s"].max() - run["arrival_s"].min())
    return seconds if seconds > 0 else 0.0


def _summary_row(mine: pd.DataFrame, makespan: float) -> dict[str, Any]:
    """One row's metrics for the pooled requests of one class, `makespan` in seconds summed over the seeds."""
    completed = mine["finish_s"].notna()
    per_second = 1 / makespan if makespan > 0 else float("nan")
    ttft = [run["ttft_s"].dropna().to_numpy() for _, run in mine.groupby("seed", sort=False)]
    lo, hi = bootstrap(ttft, np.mean)
    has_slo = bool(mine["good"].notna().any())
    return {
        "sent": len(mine),
        "completed": int(completed.sum()),
        "rejected": int((mine["status"] == "rejected").sum()),
        "ttft_mean_s": mine["ttft_s"].mean(),
        "ttft_p50_s": percentile(mine["ttft_s"], 50),
        "ttft_p95_s": percentile(mine["ttft_s"], 95),
        "ttft_p99_s": percentile(mine["ttft_s"], 99),
        "ttft_over_isolated_p99": percentile(mine["ttft_over_isolated"], 99),
        "blocking_mean_s": mine["blocking_s"].mean(),
        "blocking_p99_s": percentile(mine["blocking_s"], 99),
        "tpot_mean_s": mine["tpot_s"].mean(),
        "tpot_p50_s": percentile(mine["tpot_s"], 50),
        "tpot_p95_s": percentile(mine["tpot_s"], 95),
        "tpot_p99_s": percentile(mine["tpot_s"], 99),
        "turnaround_mean_s": mine["turnaround_s"].mean(),
        "turnaround_p50_s": percentile(mine["turnaround_s"], 50),
        "turnaround_p95_s": percentile(mine["turnaround_s"], 95),
        "turnaround_p99_s": percentile(mine["turnaround_s"], 99),
        "suspended_mean_s": mine.loc[completed, "suspended_s"].mean(),
        "slo_attainment": mine["good"].mean(),
        **{column: mine[column].mean() for column in BOUNDS.values()},
        "goodput_rps": mine["good"].sum() * per_second if has_slo else float("nan"),
        "throughput_rps": completed.sum() * per_second,
        "output_tokens_per_s": mine.loc[completed, "output_tokens"].sum() * per_second,
        "preemptions": int(mine["preemptions"].sum()),
        "evictions": int(mine["evictions"].sum()),
        "cached_share": _cached_share(mine[completed]),
        "ttft_mean_lo_s": lo,
        "ttft_mean_hi_s": hi,
    }


def _cached_share(finished: pd.DataFrame) -> float:
    prompts = finished["prompt_tokens"].sum()
    return finished["cached_tokens"].sum() / prompts if "cached_tokens" in finished and prompts else float("nan")


def percentile(values: pd.Series | np.ndarray, percent: float) -> float:
    """Linear interpolation between order statistics over the values that are not nan; nan if there are none."""
    given = np.asarray(values, dtype=float)
    present = given[~np.isnan(given)]
    return float(np.percentile(present, percent)) if len(present) else float("nan")
