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
    slo_attainment  good / sent; good = finished and within every SLO of its class (empty for a class without SLO)
    goodput         good / makespan
    preemptions     how often a pass with a request of the class in it was suspended, summed over its requests
    ttft_mean_lo/hi 95 % t-interval for the mean over the seeds' means (empty with one seed)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qllm.config.schema import Slo

#: Columns of summary.csv after policy, rate and class, in order; further swept keys follow at the end.
SUMMARY_COLUMNS = (
    "sent",
    "completed",
    "rejected",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "ttft_over_isolated_p99",
    "blocking_mean_s",
    "blocking_p99_s",
    "tpot_mean_s",
    "tpot_p99_s",
    "turnaround_mean_s",
    "turnaround_p99_s",
    "suspended_mean_s",
    "slo_attainment",
    "goodput_rps",
    "throughput_rps",
    "output_tokens_per_s",
    "preemptions",
    "ttft_mean_lo_s",
    "ttft_mean_hi_s",
)

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom (any statistics textbook); 1.960 beyond.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


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


def good(requests: pd.DataFrame, slos: Mapping[str, Slo | None]) -> pd.Series:
    """1.0 for a row of `per_request` within all its SLOs, 0.0 if not, nan without an SLO; one token meets any TPOT."""
    verdict = pd.Series(np.nan, index=requests.index)
    finished = requests["finish_s"].notna()
    for name, slo in slos.items():
        mine = requests["class"] == name
        if slo is None:
            continue
        meets = finished & mine
        if slo.ttft is not None:
            meets &= requests["ttft_s"] <= slo.ttft
        if slo.ttft_over_isolated is not None:
            meets &= requests["ttft_over_isolated"] <= slo.ttft_over_isolated
        if slo.tpot is not None:
            meets &= (requests["tpot_s"] <= slo.tpot) | (requests["output_tokens"] == 1)
        verdict[mine] = meets[mine].astype(float)
    return verdict


def band(seed_means: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % t-interval for the mean over seeds: mean -+ t * s / sqrt(n). (nan, nan) for fewer than two finite means."""
    means = np.asarray(seed_means, dtype=float)
    means = means[np.isfinite(means)]
    if len(means) < 2:
        return float("nan"), float("nan")
    t = _T95[len(means) - 2] if len(means) - 2 < len(_T95) else 1.960
    half = t * means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean() - half), float(means.mean() + half)


def summarise(requests: pd.DataFrame, slos: Mapping[str, Slo | None], coordinates: Sequence[str] = ()) -> pd.DataFrame:
    """Work out the summary: a row per policy, swept values and class, in order of appearance.

    Args:
        requests: A row per request, as in requests.parquet.
        slos: SLO of each class, in the order wanted. A class without a request still has its row, with sent = 0.
        coordinates: The swept keys.

    Returns:
        The columns policy, rate, class, `SUMMARY_COLUMNS`, and the other swept keys.
    """
    values = per_request(requests)
    values["good"] = good(values, slos)
    others = [name for name in coordinates if name != "rate"]
    point = ["policy", "rate", *others]
    rows: list[dict[str, Any]] = []
    for key, at_point in values.groupby(point, sort=False, observed=True, dropna=False):
        runs = at_point.groupby("seed", sort=False)
        makespan = float((runs["finish_s"].max() - runs["arrival_s"].min()).sum())
        coordinate = dict(zip(point, key if isinstance(key, tuple) else (key,), strict=True))
        for name in slos:
            row = _summary_row(at_point[at_point["class"] == name], makespan)
            head = {"policy": coordinate["policy"], "rate": coordinate["rate"], "class": name}
            rows.append({**head, **row, **{other: coordinate[other] for other in others}})
    return pd.DataFrame(rows, columns=["policy", "rate", "class", *SUMMARY_COLUMNS, *others])


def _summary_row(mine: pd.DataFrame, makespan: float) -> dict[str, Any]:
    """One row's metrics for the pooled requests of one class, `makespan` in seconds summed over the seeds."""
    completed = mine["finish_s"].notna()
    per_second = 1 / makespan if makespan > 0 else float("nan")
    lo, hi = band(mine.groupby("seed", sort=False)["ttft_s"].mean().to_numpy())
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
        "tpot_p99_s": percentile(mine["tpot_s"], 99),
        "turnaround_mean_s": mine["turnaround_s"].mean(),
        "turnaround_p99_s": percentile(mine["turnaround_s"], 99),
        "suspended_mean_s": mine.loc[completed, "suspended_s"].mean(),
        "slo_attainment": mine["good"].mean() if has_slo else float("nan"),
        "goodput_rps": mine["good"].sum() * per_second if has_slo else float("nan"),
        "throughput_rps": completed.sum() * per_second,
        "output_tokens_per_s": mine.loc[completed, "output_tokens"].sum() * per_second,
        "preemptions": int(mine["preemptions"].sum()),
        "ttft_mean_lo_s": lo,
        "ttft_mean_hi_s": hi,
    }


def percentile(values: pd.Series | np.ndarray, percent: float) -> float:
    """Linear interpolation between order statistics over the values that are not nan; nan if there are none."""
    given = np.asarray(values, dtype=float)
    present = given[~np.isnan(given)]
    return float(np.percentile(present, percent)) if len(present) else float("nan")
