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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qllm.config.schema import Slo, Warmup
from qllm.experiment.estimates import bootstrap, mean, percentile, percentiles

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
#: Columns of `per_request` that a row of the summary is worked out from.
_COLUMNS = (
    *("seed", "status", "output_tokens", "arrival_s", "finish_s", "ttft_s", "ttft_over_isolated", "blocking_s"),
    *("tpot_s", "turnaround_s", "suspended_s", "preemptions", "evictions"),
)
_CACHED = ("cached_tokens", "prompt_tokens")  #: the same where there is a prefix cache
Columns = dict[str, np.ndarray]  # an array for each column of some requests


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


def saturated(requests: pd.DataFrame | Columns) -> bool:
    """Whether the queue of these requests of one class was still growing when arrivals ended, over all seeds.

    The queue is what is in the system when a request arrives: those sent before it, neither finished nor rejected. Its
    growth is its mean over the last quarter of the arrivals - that over the second quarter, summed over the seeds. At a
    load below 1 it comes and goes; with n Poisson arrivals at a load of just 1 it is a random walk, and that growth
    exceeds 1.3 sqrt(n) with a probability of at most 5 %; at a load r above 1 it is (1 - 1/r) n / 2. Growth beyond
    sqrt(2 n) is more than chance. Where all arrive at one instant nothing arrives while others are served: False.
    """
    arrivals, finishes, seeds, status = (
        np.asarray(requests[name]) for name in ("arrival_s", "finish_s", "seed", "status")
    )
    served = status != "rejected"
    growth, sent = 0.0, 0
    for rows in _by_seed(seeds[served]):
        arrival = np.sort(arrivals[served][rows])
        n, quarter = len(arrival), len(arrival) // 4
        if quarter and arrival[-1] > arrival[0]:
            finish = np.sort(finishes[served][rows])  # nan, for never, comes last
            ahead = np.arange(n) - np.searchsorted(finish, arrival, side="right")
            growth += ahead[-quarter:].mean() - ahead[n // 2 - quarter : n // 2].mean()
            sent += n
    return bool(growth > np.sqrt(2 * sent))


def after_warmup(requests: pd.DataFrame, warmup: Warmup | None) -> pd.DataFrame:
    """The requests of one run that arrive after the warm-up; the table itself where there is none."""
    if warmup is None:
        return requests
    kept: pd.DataFrame = requests.loc[_counts(requests["arrival_s"], warmup)]
    return kept


def _counts(arrival: pd.Series, warmup: Warmup) -> np.ndarray:
    """Which of the requests of one run that arrive at `arrival` come after the warm-up, bool[n]."""
    if warmup.seconds is not None:
        return np.asarray(arrival - arrival.min() >= warmup.seconds)
    return np.asarray(arrival.rank(method="first") > round((warmup.share or 0.0) * len(arrival), 6))


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
    # What is said of a request needs no other; then arrays, as a point's rows are few and pandas takes long for each.
    values = judged(requests, slos)
    found = [name for name in _CACHED if "cached_tokens" in values]
    columns = {name: values[name].to_numpy() for name in (*_COLUMNS, *found, *BOUNDS.values(), "good")}
    columns["kv_peak"] = values["kv_peak"].to_numpy() if "kv_peak" in values else np.full(len(values), np.nan)
    of_class = {name: (values["class"] == name).to_numpy() for name in slos}
    places = requests[point].assign(row=np.arange(len(requests)))
    rows: list[dict[str, Any]] = []
    for key, at_point in places.groupby(point, sort=False, observed=True, dropna=False):
        here = at_point["row"].to_numpy()
        runs = [here[rows_of_seed] for rows_of_seed in _by_seed(columns["seed"][here])]
        if warmup is not None:
            runs = [run[_counts(pd.Series(columns["arrival_s"][run]), warmup)] for run in runs]
        counted = np.concatenate(runs)
        makespan = sum(_span(columns["arrival_s"][run], columns["finish_s"][run]) for run in runs)
        coordinate = dict(zip(point, key if isinstance(key, tuple) else (key,), strict=True))
        for name, mine in of_class.items():
            row = _summary_row(_rows(columns, counted[mine[counted]]), makespan)
            row["saturated"] = saturated(_rows(columns, here[mine[here]]))
            row["kv_peak"] = np.fmax.reduce(columns["kv_peak"][here])
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
    return _span(run["arrival_s"].to_numpy(), run["finish_s"].to_numpy())


def _span(arrival: np.ndarray, finish: np.ndarray) -> float:
    finished = finish[~np.isnan(finish)]
    return max(float(finished.max() - arrival.min()), 0.0) if len(finished) else 0.0


def _rows(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _by_seed(seeds: np.ndarray) -> list[np.ndarray]:
    """The places of each seed in `seeds`, in order of appearance."""
    return [np.flatnonzero(seeds == seed) for seed in pd.unique(seeds)]


def _summary_row(mine: Columns, makespan: float) -> dict[str, Any]:
    """One row's metrics for the pooled requests of one class, `makespan` in seconds summed over the seeds."""
    completed = ~np.isnan(mine["finish_s"])
    per_second = 1 / makespan if makespan > 0 else float("nan")
    ttft = [mine["ttft_s"][rows] for rows in _by_seed(mine["seed"])]
    lo, hi = bootstrap([seconds[~np.isnan(seconds)] for seconds in ttft], np.mean)
    has_slo = not np.isnan(mine["good"]).all()
    times: dict[str, float] = {}
    for name in ("ttft", "tpot", "turnaround"):
        p50, p95, p99 = percentiles(mine[f"{name}_s"], (50, 95, 99))
        times |= {f"{name}_p50_s": p50, f"{name}_p95_s": p95, f"{name}_p99_s": p99}
    return {
        "sent": len(completed),
        "completed": int(completed.sum()),
        "rejected": int((mine["status"] == "rejected").sum()),
        **{f"{name}_mean_s": mean(mine[f"{name}_s"]) for name in ("ttft", "blocking", "tpot", "turnaround")},
        **times,
        "ttft_over_isolated_p99": percentile(mine["ttft_over_isolated"], 99),
        "blocking_p99_s": percentile(mine["blocking_s"], 99),
        "suspended_mean_s": mean(mine["suspended_s"][completed]),
        "slo_attainment": mean(mine["good"]),
        **{column: mean(mine[column]) for column in BOUNDS.values()},
        "goodput_rps": np.nansum(mine["good"]) * per_second if has_slo else float("nan"),
        "throughput_rps": completed.sum() * per_second,
        "output_tokens_per_s": mine["output_tokens"][completed].sum() * per_second,
        "preemptions": int(mine["preemptions"].sum()),
        "evictions": int(mine["evictions"].sum()),
        "cached_share": _cached_share(mine, completed),
        "ttft_mean_lo_s": lo,
        "ttft_mean_hi_s": hi,
    }


def _cached_share(mine: Columns, completed: np.ndarray) -> float:
    if "cached_tokens" not in mine or not completed.any():
        return float("nan")
    return float(mine["cached_tokens"][completed].sum() / mine["prompt_tokens"][completed].sum())
