"""Figures of one point of a sweep, and of timing traces: what is drawn is what the tables hold."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.container import BarContainer

import qllm
from qllm.experiment.results import Results
from qllm.plots.point import PARTS
from qllm.plots.step_times import roofline
from qllm.traces.step_times.model_shapes import SHAPES
from qllm.traces.step_times.timings import Timings
from tests.cli_support import write_config

mpl.use("Agg")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder: Path = tmp_path_factory.mktemp("breakdowns")
    return qllm.simulate(write_config(folder))


def test_cdf_ends_at_the_share_of_requests_that_have_the_value(results: Results) -> None:
    cut = results.requests.copy()
    lost = (cut["class"] == "ls") & (cut["rate"] == 50) & (cut["policy"] == "fcfs")
    cut.loc[lost.idxmax(), ["first_token_s", "finish_s"]] = np.nan
    ax = qllm.plot_cdf(Results.of(cut, results.config), at=50)
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert lines["qllm"][-1] == 1
    assert lines["fcfs"][-1] == pytest.approx(1 - 1 / lost.sum())


def test_ablation_bars_are_the_summarys_column(results: Results) -> None:
    ax = qllm.plot_ablation(results, "ttft_p99_s", at=5)
    rows = results.summary[(results.summary["class"] == "ls") & (results.summary["rate"] == 5)]
    assert [bar.get_width() for bar in ax.patches] == list(rows["ttft_p99_s"])  # type: ignore[attr-defined]


def test_parts_of_the_time_spent_add_up_to_the_mean_turnaround(results: Results) -> None:
    ax = qllm.plot_time_spent(results, cls="be", at=50)
    stacks = [box for box in ax.containers if isinstance(box, BarContainer)]
    assert len(stacks) == len(PARTS)
    ends = [bar.get_x() + bar.get_width() for bar in stacks[-1]]
    rows = results.summary[(results.summary["class"] == "be") & (results.summary["rate"] == 50)]
    assert ends == pytest.approx(list(rows["turnaround_mean_s"]))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda r: qllm.plot_cdf(r, "ttft"), "allowed: ttft_s"),
        (lambda r: qllm.plot_cdf(r, at=7), "allowed: 5, 50"),
        (lambda r: qllm.plot_time_spent(r, cls="batch"), "allowed: ls, be"),
        (lambda r: qllm.plot_ablation(r, "speed"), "speed"),
    ],
)
def test_what_was_not_swept_is_refused(results: Results, call, told: str) -> None:
    with pytest.raises(qllm.ConfigError, match=told):
        call(results)


def test_expert_times_show_every_point_of_the_trace() -> None:
    timings = Timings.load("a100-mixtral-8x7b-int4")
    ax = qllm.plot_expert_times(timings)
    drawn = sum(len(box.lines[0].get_xdata()) for box in ax.containers)  # type: ignore[attr-defined]
    assert drawn == sum(point.step == "expert" for point in timings.points)


def test_roofline_is_bound_by_memory_at_one_token_and_by_arithmetic_at_many() -> None:
    shape = SHAPES["mixtral-8x7b"]
    few, many = roofline(np.array([1, 8192]), shape, "bf16", flops=312e12, bandwidth=2.039e12)
    assert few == pytest.approx(2 * shape.expert_weights / 2.039e12, rel=1e-3)
    assert many == pytest.approx(2 * shape.expert_weights * 8192 / 312e12)


def test_a_figure_of_results_says_where_its_step_times_come_from(results: Results) -> None:
    ax = qllm.plot_ttft(results)
    figure = ax.figure
    qllm.add_caption(figure, results)  # type: ignore[arg-type]
    assert "modelled" in figure.get_supxlabel()  # type: ignore[union-attr]
