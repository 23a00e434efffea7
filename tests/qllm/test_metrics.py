"""The metrics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qllm.config.schema import Slo
from qllm.experiment.metrics import SUMMARY_COLUMNS, band, good, per_request, percentile, summarise

NAN = float("nan")
COLUMNS = ["seed", "class", "arrival_s", "first_launch_s", "first_token_s", "finish_s", "output_tokens"]
#: two runs; in the second the last request was rejected
ROWS = [
    (0, "ls", 1.0, 1.5, 2.0, 6.0, 5),  # ttft 1, tpot 1, turnaround 5, blocking 0.5
    (0, "ls", 2.0, 4.0, 5.0, 5.0, 1),  # ttft 3, no tpot, turnaround 3, blocking 2
    (0, "be", 0.0, 0.0, 4.0, 10.0, 3),  # ttft 4, tpot 3, turnaround 10
    (1, "ls", 10.0, 10.0, 12.0, 30.0, 10),  # ttft 2, tpot 2, turnaround 20, blocking 0
    (1, "ls", 11.0, NAN, NAN, NAN, 4),
]


@pytest.fixture
def requests() -> pd.DataFrame:
    frame = pd.DataFrame(ROWS, columns=COLUMNS)
    return frame.assign(
        policy="fcfs",
        rate=2.0,
        suspended_s=[0.0, 1.0, 2.0, 5.0, NAN],
        preemptions=[0, 1, 2, 3, 0],
        isolated_ttft_s=[0.5, 1.0, 2.0, 0.5, 1.0],
        status=["finished"] * 4 + ["rejected"],
    )


def test_summary_by_hand(requests: pd.DataFrame) -> None:
    summary = summarise(requests, {"ls": Slo(ttft=2.5), "be": None})
    assert list(summary.columns) == ["policy", "rate", "class", *SUMMARY_COLUMNS]
    ls, be = summary.to_dict("records")
    makespan = (10.0 - 0.0) + (30.0 - 10.0)  # last finish - first arrival of each run, all classes
    expected = {
        "sent": 4,
        "completed": 3,
        "rejected": 1,
        "ttft_mean_s": 2.0,
        "ttft_p50_s": 2.0,
        "ttft_p95_s": 2.9,
        "ttft_p99_s": 2.98,
        "ttft_over_isolated_p99": np.percentile([2, 3, 4], 99),
        "blocking_mean_s": 2.5 / 3,
        "tpot_mean_s": 1.5,
        "turnaround_mean_s": 28 / 3,
        "suspended_mean_s": 2.0,
        "slo_attainment": 2 / 4,  # ttft 1 and 2 of four sent; the rejected one is not good
        "goodput_rps": 2 / makespan,
        "throughput_rps": 3 / makespan,
        "output_tokens_per_s": 16 / makespan,
        "preemptions": 4,
        "ttft_mean_lo_s": 2.0,  # both seeds have a mean of 2
        "ttft_mean_hi_s": 2.0,
    }
    assert {key: ls[key] for key in expected} == pytest.approx(expected)
    assert be["class"] == "be"
    assert (be["sent"], be["ttft_mean_s"], be["tpot_mean_s"]) == (1, 4.0, 3.0)
    assert np.isnan([be["slo_attainment"], be["goodput_rps"], be["ttft_mean_lo_s"]]).all()


def test_an_slo_needs_all_of_its_parts(requests: pd.DataFrame) -> None:
    values = per_request(requests)

    def verdicts(**slo: float) -> list[float]:
        return good(values, {"ls": Slo(**slo)})[values["class"] == "ls"].tolist()

    assert verdicts(ttft=3.0) == [1, 1, 1, 0]
    assert verdicts(ttft_over_isolated=3.0) == [1, 1, 0, 0]
    assert verdicts(tpot=1.5) == [1, 1, 0, 0]  # a single token has no tpot and meets it
    assert verdicts(ttft=2.5, tpot=1.5) == [1, 0, 0, 0]
    assert good(values, {"ls": Slo(ttft=1)})[values["class"] == "be"].isna().all()


def test_band_is_the_t_interval_over_seeds() -> None:
    # mean 2, s = 1, n = 3: half width 4.303 / sqrt(3)
    assert band([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert band([1.0, 2.0, NAN, 3.0]) == band([1.0, 2.0, 3.0])
    assert np.isnan(band([1.0])).all()
    # far beyond the table the normal quantile holds
    many = np.tile([0.0, 2.0], 50)
    assert band(many)[1] == pytest.approx(1 + 1.96 * many.std(ddof=1) / 10)


def test_percentile_interpolates_and_leaves_nan_out() -> None:
    assert percentile(pd.Series([1.0, NAN, 2.0]), 50) == 1.5
    assert np.isnan(percentile(pd.Series([NAN]), 50))


def test_points_and_swept_keys_have_rows_of_their_own(requests: pd.DataFrame) -> None:
    more = [requests.assign(rate=rate, **{"limits.max_seqs": n}) for rate in (1.0, 2.0) for n in (4, 8)]
    summary = summarise(pd.concat(more), {"ls": None, "be": None}, ["rate", "limits.max_seqs"])
    assert summary.columns[-1] == "limits.max_seqs"
    found = summary[["rate", "limits.max_seqs", "class"]].to_records(index=False).tolist()
    assert found == [(r, n, cls) for r in (1.0, 2.0) for n in (4, 8) for cls in ("ls", "be")]
    assert (summary["sent"] == [4, 1] * 4).all()


def test_a_class_without_requests_keeps_its_row(requests: pd.DataFrame) -> None:
    summary = summarise(requests[requests["class"] == "be"], {"ls": Slo(ttft=1), "be": None})
    ls = summary[summary["class"] == "ls"].iloc[0]
    assert ls["sent"] == 0
    assert np.isnan(ls["ttft_mean_s"])
