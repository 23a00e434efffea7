"""The metrics against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.config.schema import Slo, Warmup
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.estimates import bootstrap, percentile
from qllm.experiment.metrics import SUMMARY_COLUMNS, good, per_request, saturated, summarise
from qllm.experiment.sweep import simulate
from tests.cli_support import write_config

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
        evictions=[0, 2, 7, 1, 0],
        kv_peak=[0.5, 0.5, 0.5, 0.75, 0.75],
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
        "evictions": 3,
        "kv_peak": 0.75,
        "saturated": False,
        "slo_ttft_met": 2 / 4,
        "ttft_mean_lo_s": 2.0,  # both seeds have a mean of 2
        "ttft_mean_hi_s": 2.0,
    }
    assert {key: ls[key] for key in expected} == pytest.approx(expected)
    assert be["class"] == "be"
    assert (be["sent"], be["ttft_mean_s"], be["tpot_mean_s"]) == (1, 4.0, 3.0)
    assert np.isnan([be["slo_attainment"], be["goodput_rps"], be["ttft_mean_lo_s"]]).all()
    assert np.isnan([ls["slo_tpot_met"], ls["slo_ttft_over_isolated_met"], be["slo_ttft_met"]]).all()


def test_an_slo_needs_all_of_its_parts(requests: pd.DataFrame) -> None:
    values = per_request(requests)

    def verdicts(**slo: float) -> list[float]:
        return good(values, {"ls": Slo(**slo)})[values["class"] == "ls"].tolist()

    assert verdicts(ttft=3.0) == [1, 1, 1, 0]
    assert verdicts(ttft_over_isolated=3.0) == [1, 1, 0, 0]
    assert verdicts(tpot=1.5) == [1, 1, 0, 0]  # a single token has no tpot and meets it
    assert verdicts(ttft=2.5, tpot=1.5) == [1, 0, 0, 0]
    assert good(values, {"ls": Slo(ttft=1)})[values["class"] == "be"].isna().all()


def test_attainment_by_bound_tells_which_bound_is_missed(requests: pd.DataFrame) -> None:
    summary = summarise(requests, {"ls": Slo(ttft=2.5, ttft_over_isolated=3.0, tpot=1.5), "be": Slo(tpot=3.0)})
    ls, be = summary.to_dict("records")
    bounds = ["slo_ttft_met", "slo_ttft_over_isolated_met", "slo_tpot_met", "slo_attainment"]
    assert [ls[name] for name in bounds] == [2 / 4, 2 / 4, 2 / 4, 1 / 4]
    assert (be["slo_tpot_met"], be["slo_attainment"]) == (1.0, 1.0)


def test_a_band_is_what_drawing_the_seeds_again_gives() -> None:
    three = [np.array([1.0]), np.array([2.0]), np.array([9.0])]
    # of 27 draws one is 1, 1, 1 and one is 9, 9, 9: more than 2.5 % each
    assert bootstrap(three, np.mean) == (1.0, 9.0)
    many = [np.array([value]) for value in np.tile([0.0, 2.0], 50)]
    low, high = bootstrap(many, np.mean)
    assert (low, high) == pytest.approx((1 - 1.96 / 10, 1 + 1.96 / 10), abs=0.03)  # of the normal distribution
    assert np.isnan(bootstrap(three[:1], np.mean)).all()
    assert np.isnan(bootstrap([*three[:1], np.array([])], np.mean)).all()
    # the values are pooled: a seed with more of them weighs more
    assert bootstrap([np.array([1.0]), np.array([4.0, 4.0])], np.sum) == (2.0, 16.0)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), min_size=2, max_size=6))
def test_a_band_of_positive_values_is_positive_and_within_what_seeds_give(seeds: list[list[float]]) -> None:
    arrays = [np.array(values) for values in seeds]
    low, high = bootstrap(arrays, np.mean)
    means = [values.mean() for values in arrays]
    assert 0 < min(means) * (1 - 1e-9) <= low <= high <= max(means) * (1 + 1e-9)


def queue(load: float, n: int, seeds: list[int], servers: int = 1) -> pd.DataFrame:
    """An M/D/c queue: Poisson arrivals at `load` per second and server, each served for a second in turn."""
    runs = []
    for seed in seeds:
        arrival = np.cumsum(np.random.default_rng(seed).exponential(1 / (load * servers), n))
        finish = np.full(n, -np.inf)
        for i in range(n):
            finish[i] = max(arrival[i], finish[i - servers] if i >= servers else 0.0) + 1
        runs.append(pd.DataFrame({"seed": seed, "arrival_s": arrival, "finish_s": finish, "status": "finished"}))
    return pd.concat(runs)


seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=3, unique=True)


@given(st.floats(0.1, 0.85), st.integers(2, 1500), seeds, st.sampled_from([1, 8]))
@settings(max_examples=60, deadline=None)
def test_a_queue_below_capacity_is_not_saturated(load: float, n: int, seeds: list[int], servers: int) -> None:
    assert not saturated(queue(load, n, seeds, servers))


@given(st.floats(1.6, 20), st.integers(600, 1500), seeds, st.sampled_from([1, 8]))
@settings(max_examples=60, deadline=None)
def test_a_queue_above_capacity_is_saturated(load: float, n: int, seeds: list[int], servers: int) -> None:
    assert saturated(queue(load, n, seeds, servers))


def test_saturation_needs_arrivals_and_more_than_chance() -> None:
    assert saturated(queue(1.15, 1000, [0, 1, 2, 3, 4]))
    assert not saturated(queue(5.0, 8, [0]))  # eight requests tell nothing
    assert not saturated(queue(0.5, 1, [0]))
    batch = queue(0.5, 100, [0]).assign(arrival_s=0.0, finish_s=np.arange(100.0))
    assert not saturated(batch)  # nothing arrives while others are served
    assert not saturated(queue(5.0, 1000, [0]).assign(status="rejected"))
    assert saturated(queue(0.5, 1000, [0]).assign(finish_s=np.nan))  # nobody is ever served


def test_how_often_a_queue_at_its_capacity_is_called_saturated() -> None:
    """The docstring's 5 %: at a load of just 1 growth is chance."""
    called = [saturated(queue(1.0, 400, [seed])) for seed in range(300)]
    assert np.mean(called) <= 0.05


def test_a_simulated_overload_is_marked_and_the_urgent_class_is_spared(tmp_path: Path) -> None:
    changed = ["sweep.rate=[2, 500]", "requests=200", "limits.max_seqs=1", "policies=[fcfs, priority]"]
    summary = simulate(write_config(tmp_path), set=[*changed, "classes.ls.share=0.1"]).summary
    assert not summary[summary["rate"] == 2]["saturated"].any()
    assert summary[(summary["rate"] == 500) & (summary["class"] == "be")]["saturated"].all()


def test_the_warm_up_is_left_out_of_the_metrics(requests: pd.DataFrame) -> None:
    slos = {"ls": Slo(ttft=2.5), "be": None}
    whole = summarise(requests, slos)
    assert summarise(requests, slos, warmup=Warmup(seconds=0)).equals(whole)
    assert summarise(requests, slos, warmup=Warmup(share=0)).equals(whole)
    ls, be = summarise(requests, slos, warmup=Warmup(seconds=1.0)).to_dict("records")
    # of the first run the be request at 0 s goes, of the second, which begins at 10 s, the ls request then
    assert (ls["sent"], ls["completed"], ls["rejected"], be["sent"]) == (3, 2, 1, 0)
    assert ls["ttft_mean_s"] == (1.0 + 3.0) / 2
    assert ls["throughput_rps"] == 2 / (6.0 - 1.0)  # of the second run nothing is left that finished
    half = summarise(requests, slos, warmup=Warmup(share=0.5)).iloc[0]
    assert half["sent"] == 3  # 1 of 3 and 1 of 2 go
    gone = summarise(requests, slos, warmup=Warmup(seconds=100))
    assert (gone["sent"] == 0).all()
    assert gone["ttft_mean_s"].isna().all()


def test_a_warm_up_and_an_slo_may_be_swept(tmp_path: Path) -> None:
    base = write_config(tmp_path)
    swept = simulate(base, set=["sweep.classes.ls.slo.ttft=[0.001, 0.05]", "sweep.warmup.share=[0, 0.5]"])
    assert len(swept.summary) == 2 * 2 * 2 * 2 * 2
    for share in (0, 0.5):
        for ttft in (0.001, 0.05):
            alone = simulate(base, set=[f"classes.ls.slo.ttft={ttft}", f"warmup.share={share}"])
            at = (swept.summary["classes.ls.slo.ttft"] == ttft) & (swept.summary["warmup.share"] == share)
            shown = swept.summary[at][alone.summary.columns].reset_index(drop=True)
            pd.testing.assert_frame_equal(shown, alone.summary)
    assert alone.counted["id"].min() == 20
    assert alone.counted["good"].notna().sum() == alone.summary[alone.summary["class"] == "ls"]["sent"].sum()


@pytest.mark.parametrize("value", ["{}", "{seconds: 1, share: 0.1}", "{share: 1}", "{seconds: -1}", "3", "{part: 1}"])
def test_a_wrong_warm_up_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup"):
        simulate(write_config(tmp_path), set=[f"warmup={value}"])


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
