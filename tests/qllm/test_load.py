"""The load over time: windows add up, a small example by hand, and the command line writes table and picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from qllm.config.config import load_config
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.load import WINDOWS, largest, load_table, means
from qllm.experiment.run import Run, runs
from qllm.plots.load import save_load
from qllm.plots.perfetto import record, timeline_runs
from qllm.plots.report import write_report
from qllm.traces.results import LoadPoint, LoadRecord, PassSlice, RunResult
from tests.cli_support import qllm, write_config

TWO_GPUS = ["replicas=2", "router=shared_queue", "limits.max_seqs=2"]


def ran(start: float, end: float, prefills: int, decodes: int, tokens: int, replica: int = 0) -> PassSlice:
    return PassSlice(start, end, 0, 0, prefills, decodes, tokens, 0, 9, 0, 4, "head", False, replica)


def by_hand(tmp_path: Path, changes: list[str]) -> tuple[Run, RunResult]:
    """Passes from 1 s to 4 s, 6 s to 8 s and 8 s to 10 s; the second of two GPUs, if there are, does nothing.

    A request waits from 3 s to 6 s.
    """
    (run, *_) = runs(load_config(write_config(tmp_path), ["sweep.rate=[5]", *changes]))
    result = RunResult.of(np.array([1.0, 2.0, 2.5]))
    result.slices = [ran(1, 4, 2, 1, 101), ran(6, 8, 0, 4, 4), ran(8, 10, 0, 1, 1)]
    nobody = (0, 0)
    result.load = LoadRecord(
        ("be", "ls"),
        [0, 1, 0],
        np.array([1.0, 3.0, 5.0]),
        [
            LoadPoint(0, 0.0, nobody, nobody, nobody),
            LoadPoint(1, 0.25, nobody, nobody, nobody),
            LoadPoint(3, 0.75, (1, 0), (0, 0), (0, 2)),
            LoadPoint(6, 0.5, nobody, (0, 1), nobody),
            LoadPoint(8, 0.5, nobody, nobody, nobody),
            LoadPoint(0, 0.0, nobody, nobody, nobody, replica=1),
        ],
    )
    return run, result


def test_means_and_maxima_are_those_that_one_counts_by_hand(tmp_path: Path) -> None:
    table = load_table([by_hand(tmp_path, [])], window=4.0)
    assert table["start_s"].tolist() == [0, 4, 8]
    assert table["end_s"].tolist() == [4, 8, 10]
    expected = {
        "utilisation": [0.75, 0.5, 1],
        "sequences": [9 / 4, 2, 1],
        "sequences_max": [3, 4, 1],
        "tokens": [303 / 4, 2, 1],
        "tokens_max": [101, 4, 1],
        "kv_used": [(0.25 * 2 + 0.75) / 4, (0.75 * 2 + 0.5 * 2) / 4, 0.5],
        "kv_used_max": [0.75, 0.75, 0.5],
        "waiting": [0.25, 0.5, 0],
        "waiting_max": [1, 1, 0],
        "waiting.ls": [0, 0, 0],
        "waiting.be": [0.25, 0.5, 0],
        "ready": [0, 0.5, 0],
        "ready.ls": [0, 0.5, 0],
        "suspended": [0.5, 1, 0],
        "suspended_max": [2, 2, 0],
        "suspended.ls": [0.5, 1, 0],
    }
    for column, values in expected.items():
        assert table[column].tolist() == pytest.approx(values), column
    assert (table["policy"] == "fcfs").all()
    assert (table["rate"] == 5).all()
    assert "in_front" not in table
    assert len(load_table([by_hand(tmp_path, [])])) == WINDOWS


def test_each_gpu_has_rows_and_who_waits_in_front_is_in_those_of_all(tmp_path: Path) -> None:
    table = load_table([by_hand(tmp_path, TWO_GPUS)], window=5.0)
    assert table["replica"].tolist() == [0, 0, 1, 1]
    assert table["utilisation"].tolist() == pytest.approx([0.6, 0.8, 0, 0])
    assert table["waiting"].tolist() == pytest.approx([0.4, 0.2, 0, 0])
    assert table["in_front"].tolist() == pytest.approx([0.7, 0, 0.7, 0])  # 2 s to 3 s, and 2.5 s to 5 s
    assert table["in_front_max"].tolist() == [2, 0, 2, 0]
    assert table["in_front.ls"].tolist() == pytest.approx([0.2, 0, 0.2, 0])
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    quantities = table.columns[table.columns.get_loc("replica") :]
    assert [name for name in quantities if "." not in name and f"`{name.removesuffix('_max')}`" not in text] == []


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=12),
    st.lists(st.integers(1, 200), min_size=1, max_size=9, unique=True),
)
def test_windows_of_any_length_hold_the_same_in_all(steps: list[tuple[int, int]], edges: list[int]) -> None:
    at = np.cumsum([gap for gap, _ in steps]).astype(float)
    values = np.array([value for _, value in steps])
    cut = np.array([0.0, *sorted(edges)])
    second = np.arange(cut[-1])  # nothing changes within one
    place = np.searchsorted(at, second, side="right") - 1
    known = np.append(values, 0)[place]
    assert (means((at, values), cut) * np.diff(cut)).sum() == pytest.approx(known.sum())
    for first, last, mean, most in zip(
        cut[:-1], cut[1:], means((at, values), cut), largest((at, values), cut), strict=True
    ):
        inside = known[int(first) : int(last)]
        assert mean == pytest.approx(inside.mean())
        assert most == inside.max()


@pytest.mark.parametrize("changes", [[], TWO_GPUS])
def test_windows_hold_the_seconds_of_passes_and_requests(tmp_path: Path, changes: list[str]) -> None:
    recorded = record(timeline_runs(load_config(write_config(tmp_path), changes)), load=True)
    for window in (None, 0.0137, 100.0):
        table = load_table(recorded, window)
        for (run, result), (_, rows) in zip(recorded, table.groupby("policy", sort=False), strict=True):
            seconds = rows["end_s"] - rows["start_s"]
            assert (seconds > 0).all()
            assert rows["end_s"].max() == result.makespan
            busy = sum(one.end - one.start for one in result.slices or [])
            assert (rows["utilisation"] * seconds).sum() == pytest.approx(busy)
            # Everybody's times add up to what windows hold (Little's law, with no time lost at its ends).
            assert (rows["sequences"] * seconds).sum() == pytest.approx(result.running.sum())
            front = "in_front" in rows
            for number, cls in enumerate(run.config.classes):
                mine = request_trace(run.config, run.seed).cls == number
                waiting = rows[f"waiting.{cls}"] + rows[f"ready.{cls}"]
                once = (rows[f"in_front.{cls}"] * seconds)[rows["replica"] == 0].sum() if front else 0.0
                assert (waiting * seconds).sum() + once == pytest.approx(result.queueing[mine].sum())
                assert (rows[f"suspended.{cls}"] * seconds).sum() == pytest.approx(result.suspended[mine].sum())
            assert rows["kv_used_max"].max() <= result.kv_peak
            for queue in ("waiting", "ready", "suspended"):
                assert rows[queue].to_numpy() == pytest.approx(
                    sum(rows[f"{queue}.{cls}"] for cls in run.config.classes).to_numpy(), abs=1e-12
                )
            assert (rows["utilisation"] <= 1 + 1e-9).all()


def test_a_window_too_short_is_refused_and_nothing_that_ran_is_no_row(tmp_path: Path) -> None:
    recorded = [by_hand(tmp_path, [])]
    with pytest.raises(ConfigError, match=r"--window 1e-06 gives 10,000,000 windows; .* from 1e-05 seconds on"):
        load_table(recorded, 1e-6)
    for window in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"--window is .* seconds above 0"):
            load_table(recorded, window)
    recorded[0][1].slices = []
    assert load_table(recorded).empty
    assert not save_load(load_table([]), tmp_path / "none.png", "", [])
    recorded[0][1].load = None
    with pytest.raises(ValueError, match="load=True"):
        load_table(recorded)


def test_a_line_a_policy_in_each_panel_and_the_sum_of_all_queues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    table = load_table([by_hand(tmp_path, TWO_GPUS)], window=5.0)
    twice = pd.concat([table, table.assign(policy="qllm")], ignore_index=True)
    assert save_load(twice, tmp_path / "load.png", "Simulated. affine: modelled", ["fcfs", "qllm"], "ls")
    (figure,) = figures
    drawn = [[line.get_ydata().tolist() for line in ax.get_lines()] for ax in figure.axes]
    assert drawn[0] == [pytest.approx([0.3, 0.4])] * 2  # mean of both GPUs
    assert drawn[3] == [pytest.approx([1.1, 0.2]), pytest.approx([0.2, 0])] * 2  # all, then ls
    assert [line.get_xdata().tolist() for line in figure.axes[0].get_lines()] == [[2.5, 7.5]] * 2
    assert figure.axes[0].get_lines()[0].get_color() != figure.axes[0].get_lines()[1].get_color()
    for said in ("over 5 s", "rate=5.0, seed=0", "Mean of 2 GPUs", "Dashed: ls alone", "Simulated. affine: modelled"):
        assert said in " ".join(figure.get_supxlabel().split())
    many = load_table([by_hand(tmp_path, [])], window=0.01)
    figures.clear()
    assert save_load(many, tmp_path / "load.png", "", ["fcfs"])
    busy = figures[0].axes[0].get_lines()[0].get_ydata()
    assert 200 < len(busy) <= 300
    assert busy.mean() == pytest.approx(0.7, abs=0.01)


def test_the_command_line_writes_table_and_picture(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "out"
    small = ["--set", "sweep.rate=[50]", "--set", "seeds=1", "--jobs", 1]
    done = qllm("simulate", config, "--out", out, *small, "--load", "--window", "0.25")
    assert done.returncode == 0, done.stderr
    assert (out / "load.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_parquet(out / "load.parquet")
    assert table["policy"].unique().tolist() == ["fcfs", "qllm"]
    assert (table["end_s"] - table["start_s"]).max() == pytest.approx(0.25)
    requests = pd.read_parquet(out / "requests.parquet")
    assert set(table["seed"]) == set(requests["seed"])
    assert set(table["rate"]) == set(requests["rate"])
    report = write_report([out], out / "report.html").read_text()
    assert 'alt="load over time" src="data:image/png' in report
    done = qllm("simulate", config, "--out", tmp_path / "other", "--window", "0.25")
    assert done.returncode != 0
    assert "--window: says how --load counts; allowed: with --load only" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "other").exists()
