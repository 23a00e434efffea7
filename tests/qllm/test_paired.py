"""Paired intervals: against scipy, their symmetries, and how often they hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from qllm.config.config import load_config
from qllm.experiment.paired import METRICS, differences, in_words, intervals, mean_interval, paired_rows, student_t
from qllm.experiment.results import Results, load_results
from qllm.experiment.sweep import simulate
from tests.cli_support import write_config

numbers = st.floats(-1e6, 1e6) | st.just(math.nan)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 30, 31, 1000])
@pytest.mark.parametrize("share", [0.5, 0.95, 0.999])
def test_students_t_is_scipys(df: int, share: float) -> None:
    assert student_t(df, share) == pytest.approx(stats.t.ppf((1 + share) / 2, df), rel=1e-9)


def table(values: np.ndarray, names: tuple[str, ...]) -> pd.DataFrame:
    """A row per name and seed of float64[names, seeds]."""
    rows = [
        {"at": 1, "policy": name, "seed": seed, "metric_s": value}
        for name, mine in zip(names, values, strict=True)
        for seed, value in enumerate(mine)
    ]
    return pd.DataFrame(rows)


def compared(values: np.ndarray, names: tuple[str, ...]) -> pd.DataFrame:
    return paired_rows(table(values, names), "policy", names, ["at"], ["metric_s"])


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(float, st.tuples(st.just(2), st.integers(2, 8)), elements=numbers))
def test_swapping_two_policies_swaps_the_signs(values: np.ndarray) -> None:
    one, other = compared(values, ("a", "b")), compared(values[::-1], ("b", "a"))
    assert len(one) == len(other) == int((~np.isnan(values).any(axis=0)).any())
    for row, swapped in zip(one.to_dict("records"), other.to_dict("records"), strict=True):
        assert (row["policy"], row["minus"]) == (swapped["minus"], swapped["policy"])
        for name, opposite in (("difference", "difference"), ("low", "high"), ("high", "low")):
            assert row[name] == pytest.approx(-swapped[opposite], abs=1e-6, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(float, st.integers(2, 8), elements=st.floats(-1e6, 1e6)))
def test_policies_that_do_the_same_differ_by_nothing(values: np.ndarray) -> None:
    found = compared(np.array([values, values]), ("a", "b")).iloc[0]
    assert found[["difference", "low", "high"]].to_list() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(float, st.tuples(st.just(3), st.integers(1, 6)), elements=numbers))
def test_every_two_are_the_paired_t_test_of_scipy(values: np.ndarray) -> None:
    names = ("a", "b", "c")
    for row in compared(values, names).to_dict("records"):
        d = values[names.index(row["policy"])] - values[names.index(row["minus"])]
        d = d[~np.isnan(d)]
        assert row["seeds"] == len(d) > 0
        assert row["difference"] == pytest.approx(d.mean(), abs=1e-6)
        if len(d) > 1 and d.std() > 1e-3:
            wanted = stats.ttest_1samp(d, 0).confidence_interval(0.95)
            assert (row["low"], row["high"]) == pytest.approx((wanted.low, wanted.high), rel=1e-6, abs=1e-6)
        elif len(d) < 2:
            assert math.isnan(row["low"])


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_intervals_hold_the_truth_in_95_of_100_cases(seeds: int) -> None:
    """Of 4,000 draws: within three standard deviations of the number that it should be."""
    rng = np.random.default_rng(seeds)
    shared = 10 * rng.standard_normal((4000, seeds))  # what a seed brings to both
    one, other = shared + rng.standard_normal(shared.shape) + 0.7, shared + rng.standard_normal(shared.shape)
    _, low, high, _ = intervals(one - other)
    assert abs(((low <= 0.7) & (high >= 0.7)).mean() - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 4000)
    unpaired = np.hypot(*((many[2] - many[1]) / 2 for many in (intervals(one), intervals(other))))
    assert np.median(high - low) < 0.3 * np.median(2 * unpaired)  # what pairing is for


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert mean_interval([3.0])[:1] == (3.0,)
    assert math.isnan(mean_interval([3.0]).low)
    assert math.isnan(mean_interval([]).mean)


def test_words_have_the_units_and_digits_that_read_well() -> None:
    assert in_words("ttft_p99_s", -0.0123, -0.0154, -0.0092) == "-12 ms [-15, -9]"
    assert in_words("turnaround_mean_s", 12.3, -1.0, 25.6) == "+12 s [-1, +26]"
    assert in_words("slo_attainment", 0.0051, 0.0012, 0.009) == "+0.51 points [+0.12, +0.90]"
    assert in_words("throughput_rps", 0.0, 0.0, 0.0) == "0 /s [0, 0]"
    assert in_words("ttft_mean_s", 0.5, math.nan, math.nan) == "+500 ms"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = write_config(tmp_path_factory.mktemp("paired"))
    return simulate(path, set=["seeds=3", "sweep.rate=[50]", "policies=[fcfs, qllm, {name: fcfs, label: same}]"])


def test_policies_of_a_sweep_are_compared_seed_by_seed(results: Results) -> None:
    found = differences(results)
    assert list(found.columns) == ["rate", "class", "metric", "policy", "minus", "difference", "low", "high", "seeds"]
    assert set(found["metric"]) <= set(METRICS)
    row = found.query("`class` == 'ls' and metric == 'ttft_p99_s' and policy == 'qllm' and minus == 'fcfs'").iloc[0]
    by_seed = []
    for seed in range(3):
        one = Results.of(results.requests[results.requests["seed"] == seed], results.config).summary
        p99 = one[one["class"] == "ls"].set_index("policy")["ttft_p99_s"]
        by_seed.append(p99["qllm"] - p99["fcfs"])
    assert row["difference"] == pytest.approx(np.mean(by_seed))
    assert row["low"] < row["difference"] < row["high"]
    same = found[(found["policy"] == "same") & (found["minus"] == "fcfs")]
    assert (same[["difference", "low", "high"]] == 0).all().all()


def test_differences_are_written_where_there_are_seeds(results: Results, tmp_path) -> None:
    results.save(tmp_path)
    assert len(pd.read_csv(tmp_path / "differences.csv")) == len(results.differences)
    pd.testing.assert_frame_equal(load_results(tmp_path).differences, results.differences)
    one = Results.of(results.requests[results.requests["seed"] == 0], load_config(tmp_path / "config.yaml"))
    assert one.differences["low"].isna().all()
    one.save(tmp_path)
    assert not (tmp_path / "differences.csv").exists()
