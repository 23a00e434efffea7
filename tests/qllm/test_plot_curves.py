"""Figures: what the lines hold, and the same file for the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qllm.experiment.results import Results
from qllm.experiment.sweep import simulate
from qllm.plots.curves import plot_slo, plot_ttft, save_figures, x_axis
from tests.cli_support import write_config


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return simulate(write_config(tmp_path_factory.mktemp("figures")))


def lines(ax) -> dict[str, tuple[list, list]]:
    """What has a label for a legend."""
    drawn = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}
    return {label: data for label, data in drawn.items() if not label.startswith("_")}


def test_ttft_lines_are_the_summarys_columns(results: Results) -> None:
    drawn = lines(plot_ttft(results, "ttft_p99_s"))
    assert set(drawn) == {"fcfs", "qllm", "SLO 0.05 s"}
    rows = results.summary[(results.summary["policy"] == "qllm") & (results.summary["class"] == "ls")]
    assert drawn["qllm"] == (rows["rate"].tolist(), rows["ttft_p99_s"].tolist())
    assert drawn["SLO 0.05 s"][1] == [0.05, 0.05]


def test_slo_lines_agree_with_the_summary(results: Results) -> None:
    drawn = lines(plot_slo(results))
    rows = results.summary[(results.summary["policy"] == "fcfs") & (results.summary["class"] == "ls")]
    np.testing.assert_allclose(drawn["fcfs"][1], rows["slo_attainment"])


def test_another_class_and_other_swept_keys(results: Results, tmp_path: Path) -> None:
    assert "be" in plot_ttft(results, cls="be").get_ylabel()
    overrides = ["sweep.rate=[50]", "sweep.limits.max_seqs=[2, 4, 8]", "seeds=1"]
    swept = simulate(write_config(tmp_path), set=overrides)
    assert x_axis(swept) == "limits.max_seqs"
    assert lines(plot_ttft(swept))["fcfs"][0] == [2, 4, 8]
    both = simulate(write_config(tmp_path), set=[*overrides[1:], "sweep.rate=[5, 50]"])
    assert "qllm, limits.max_seqs=4" in lines(plot_slo(both))


def test_files_are_the_same_for_the_same_results_and_name_the_timings(results: Results, tmp_path: Path) -> None:
    caption = "Timings: affine: modelled; no device"
    first, second = (save_figures(results, folder, caption) for folder in _folders(tmp_path))
    assert [path.name for path in first] == [
        "ttft.png",
        "ttft.svg",
        "throughput.png",
        "throughput.svg",
        "slo.png",
        "slo.svg",
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert caption in (tmp_path / "0" / "ttft.svg").read_text()


def test_no_slo_no_slo_figure(tmp_path: Path) -> None:
    without = simulate(write_config(tmp_path), set=["classes.ls.slo=null", "sweep.rate=[5]", "seeds=1"])
    assert [path.name for path in save_figures(without, tmp_path, "")] == [
        *("ttft.png", "ttft.svg", "throughput.png", "throughput.svg")
    ]


def _folders(parent: Path) -> list[Path]:
    folders = [parent / "0", parent / "1"]
    for folder in folders:
        folder.mkdir()
    return folders
