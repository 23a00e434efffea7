"""Any number of classes, each with a priority, lengths and an SLO of its own: metrics, tables, figures, timelines."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

from qllm.cli import app
from qllm.cli.table import print_table
from qllm.config.config import load_config
from qllm.config.schema import Slo
from qllm.experiment.metrics import BOUNDS, judged, summarise, totals
from qllm.experiment.results import Results, load_results
from qllm.experiment.sweep import simulate
from qllm.plots.curves import MOST_ROWS, save_figures
from qllm.plots.perfetto import class_names, record, timeline_runs, trace_events
from qllm.plots.schedule import save_timeline, timeline_key
from qllm.scheduler import Limits, make_policy
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests import worlds
from tests.cli_support import CONFIG, write_config

mpl.use("Agg")
NAMES = ("chat", "agent", "evaluation", "batch", "bulk")
FOUR = {
    "chat": "{priority: 0, share: 0.3, prompt: {uniform: [10, 50]}, output: {fixed: 5}, slo: {ttft: 0.05, tpot: 0.01}}",
    "agent": "{priority: 1, share: 0.3, prompt: {uniform: [50, 200]}, output: {fixed: 5}, slo: {ttft: 0.3}}",
    "evaluation": "{priority: 1, share: 0.1, prompt: {uniform: [50, 200]}, output: {fixed: 3}}",
    "batch": "{priority: 2, prompt: {uniform: [200, 800]}, output: {fixed: 10}}",
}


def config(classes: dict[str, str]) -> str:
    """A configuration of these classes: name -> YAML."""
    start, end = CONFIG.index("classes:"), CONFIG.index("arrival:")
    return CONFIG[:start] + "classes:\n" + "".join(f"  {k}: {v}\n" for k, v in classes.items()) + CONFIG[end:]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return simulate(write_config(tmp_path_factory.mktemp("four"), config(FOUR)))


# ---- metrics ----------------------------------------------------------------------------------------------------

slos = st.builds(
    lambda ttft, alone, tpot: Slo(ttft=ttft, ttft_over_isolated=alone, tpot=tpot) if ttft or alone or tpot else None,
    st.sampled_from([None, 0.5, 2.0]),
    st.sampled_from([None, 3.0]),
    st.sampled_from([None, 0.1, 1.0]),
)


@st.composite
def judged_worlds(draw: st.DrawFn) -> tuple[pd.DataFrame, dict[str, Slo | None]]:
    """Requests of one point of a sweep, two seeds, of 1 to 5 classes; some rejected, some unfinished."""
    names = NAMES[: draw(st.integers(1, 5))]
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrival = np.sort(rng.uniform(0, 5, n))
    status = rng.choice(["finished", "rejected", "unfinished"], n, p=[0.7, 0.2, 0.1])
    launch = np.where(status == "rejected", np.nan, arrival + rng.exponential(0.2, n))
    first = launch + rng.exponential(0.5, n)
    output = rng.integers(1, 6, n)
    finish = np.where(status == "finished", first + (output - 1) * rng.exponential(0.3, n), np.nan)
    frame = pd.DataFrame(
        {
            "policy": "fcfs",
            "rate": 2.0,
            "seed": rng.integers(0, 2, n),
            "class": rng.choice(names, n),
            "arrival_s": arrival,
            "output_tokens": output,
            "first_launch_s": launch,
            "first_token_s": first,
            "finish_s": finish,
            "suspended_s": 0.0,
            "preemptions": rng.integers(0, 3, n),
            "evictions": rng.integers(0, 3, n),
            "kv_peak": 0.5,
            "isolated_ttft_s": 0.2,
            "status": status,
        }
    )
    return frame, {name: draw(slos) for name in names}


@given(judged_worlds())
@settings(max_examples=30, deadline=None)
def test_each_request_counts_in_the_row_of_its_class_and_once_in_the_totals(world) -> None:
    requests, bounds = world
    summary = summarise(requests, bounds)
    assert summary["class"].tolist() == list(bounds)
    [total] = totals(summary).to_dict("records")
    assert (total["sent"], total["rejected"]) == (len(requests), (requests["status"] == "rejected").sum())
    assert total["completed"] == requests["finish_s"].notna().sum()
    by_class = summary.set_index("class")
    for name in bounds:
        mine = requests[requests["class"] == name]
        row = by_class.loc[name]
        assert (row["sent"], row["completed"]) == (len(mine), mine["finish_s"].notna().sum())
        assert row["rejected"] == (mine["status"] == "rejected").sum()
    for column in ("preemptions", "evictions"):
        assert total[column] == requests[column].sum()
    for column in ("throughput_rps", "output_tokens_per_s"):
        assert total[column] == pytest.approx(summary[column].sum(min_count=1), nan_ok=True)


@given(judged_worlds())
@settings(max_examples=30, deadline=None)
def test_attainment_is_a_share_of_what_was_sent_and_undefined_without_a_bound(world) -> None:
    requests, bounds = world
    summary = summarise(requests, bounds).set_index("class")
    for name, slo in bounds.items():
        row = summary.loc[name]
        given = [column for key, column in BOUNDS.items() if slo is not None and getattr(slo, key) is not None]
        if not row["sent"]:
            assert np.isnan(row["slo_attainment"])
            continue
        assert all(np.isnan(row[column]) for column in set(BOUNDS.values()) - set(given))
        if given:
            met = row[given].to_numpy(dtype=float)
            assert 0 <= row["slo_attainment"] <= met.min() <= met.max() <= row["completed"] / row["sent"]
            assert row["slo_attainment"] >= met.sum() - len(met) + 1 - 1e-9  # who misses one misses all
        else:
            assert np.isnan(row["slo_attainment"])
            assert np.isnan(row["goodput_rps"])
    [total] = totals(summary.reset_index()).to_dict("records")
    verdicts = judged(requests, bounds)["good"].dropna()
    assert total["slo_attainment"] == pytest.approx(verdicts.mean() if len(verdicts) else np.nan, nan_ok=True)


def test_percentiles_of_a_class_are_ordered_and_of_its_own_requests(four: Results) -> None:
    for metric in ("ttft", "tpot", "turnaround"):
        low, middle, high = (four.summary[f"{metric}_p{percent}_s"] for percent in (50, 95, 99))
        assert ((low <= middle) & (middle <= high)).all()
    at = (four.summary["class"] == "agent") & (four.summary["policy"] == "fcfs") & (four.summary["rate"] == 50)
    mine = four.counted.query("`class` == 'agent' and policy == 'fcfs' and rate == 50")
    [row] = four.summary[at].to_dict("records")
    assert row["tpot_p95_s"] == pytest.approx(mine["tpot_s"].quantile(0.95))
    assert row["turnaround_p50_s"] == pytest.approx(mine["turnaround_s"].median())


# ---- the printed table ------------------------------------------------------------------------------------------


def test_the_table_has_every_class_its_bounds_and_the_totals(four: Results, capsys) -> None:
    print_table(four, "Timings: made up", Path("out/x"))
    text = capsys.readouterr().out
    head = [line.split() for line in text.splitlines()[:4]]
    assert [word for word in head[1] if word in ("TTFT", "TPOT", "SLO")][-3:] == ["TTFT", "TPOT", "SLO"]
    assert head[2].count("met") == 3
    rows = re.findall(r"^ +50 +(\S+) +fcfs +", text, re.MULTILINE)
    assert rows == [*FOUR, "(all)"]
    [line] = re.findall(r"^ +50 +\(all\) +fcfs +(.*)", text, re.MULTILINE)
    [total] = totals(four.summary).query("policy == 'fcfs' and rate == 50").to_dict("records")
    assert f"{total['slo_attainment']:.1%} {total['throughput_rps']:6.2f}".split() == line.split()[9:11]


def test_a_single_class_has_no_totals_and_single_bounds_no_columns(tmp_path: Path, capsys) -> None:
    text = config({"chat": FOUR["agent"].replace("share: 0.3, ", "")})
    print_table(simulate(write_config(tmp_path, text), set=["seeds=1"]), "x", Path("out/x"))
    text = capsys.readouterr().out
    assert "(all)" not in text
    assert [line.split().count("met") for line in text.splitlines()[:4]] == [0, 0, 1, 0]


# ---- figures ----------------------------------------------------------------------------------------------------


def figures(results: Results, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """What `save_figures` draws, by name."""
    found: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.update({path.stem: self}))
    save_figures(results, folder, "Timings: affine: modelled")
    return found


LONG = {
    "interactive chat of paying customers, in Europe": FOUR["chat"].replace("tpot", "ttft_over_isolated: 4, tpot"),
    "agents that call tools and wait for them": FOUR["agent"],
    "evaluation": FOUR["evaluation"],
    "batch": FOUR["batch"],
}


@pytest.mark.parametrize("classes", [FOUR, LONG], ids=["short names", "long names"])
def test_labels_of_four_classes_neither_collide_nor_leave_the_page(classes, tmp_path, monkeypatch) -> None:
    for figure in figures(simulate(write_config(tmp_path, config(classes))), tmp_path, monkeypatch).values():
        figure.draw_without_rendering()
        shown = [ax for ax in figure.axes if ax.axison]
        sides: dict[float, list[tuple[float, float]]] = {}
        for ax in shown:
            box = ax.yaxis.label.get_window_extent()
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
            sides.setdefault(round(ax.get_position().x0, 3), []).append((box.y0, box.y1))
        for column in sides.values():
            assert all(top <= bottom for (_, top), (bottom, _) in pairwise(sorted(column)))
        legend = figure.legends[0].get_window_extent()
        assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert all(legend.y0 >= ax.get_window_extent().y1 for ax in shown)


def test_all_classes_are_drawn_and_bounds_that_differ_have_one_sign(four: Results, tmp_path, monkeypatch) -> None:
    found = figures(four, tmp_path, monkeypatch)
    assert [ax.get_ylabel().split()[0] for ax in found["ttft"].axes[::2]] == list(FOUR)
    legend = [text.get_text() for text in found["ttft"].legends[0].get_texts()]
    assert [label for label in legend if "SLO" in label] == ["SLO of the class"]
    drawn = [line for ax in found["ttft"].axes[::2] for line in ax.get_lines()]
    assert [line.get_ydata()[0] for line in drawn if "SLO" in str(line.get_label())] == [0.05, 0.3]
    shown = [ax.get_ylabel() for ax in found["slo"].axes if ax.axison]
    assert [label for label in shown if "attainment" in label] == [
        "chat SLO attainment (good / sent)",
        "agent SLO attainment (good / sent)",
    ]


def test_rejections_are_told_by_class(tmp_path, monkeypatch) -> None:
    found = simulate(write_config(tmp_path, config(FOUR)), set=["limits.kv_blocks=40", "seeds=1"])
    rejected = found.counted.loc[found.counted["status"] == "rejected", "class"].tolist()
    assert set(rejected) == {"batch"}
    caption = figures(found, tmp_path, monkeypatch)["ttft"].get_supxlabel().replace("\n", " ")
    assert f"{len(rejected)} of {len(found.counted)} requests were rejected and have no times. " in caption
    assert f"By class: batch {len(rejected)}." in caption


def test_more_classes_than_a_figure_has_room_for_are_in_the_table(tmp_path, monkeypatch, capsys) -> None:
    each = "{{priority: {0}, share: 0.0075, prompt: {{fixed: 10}}, output: {{fixed: 2}}}}"
    many = {f"c{i}": each.format(i) for i in range(130)} | {"rest": each.format(130).replace("share: 0.0075, ", "")}
    found = simulate(write_config(tmp_path, config(many)), set=["seeds=1", "sweep.rate=[50]", "policies=[priority]"])
    assert found.summary["class"].tolist() == list(many)
    assert found.summary["sent"].sum() == len(found.requests)
    drawn = figures(found, tmp_path, monkeypatch)["ttft"]
    assert len(drawn.axes) == 2 * MOST_ROWS
    told = f"{131 - MOST_ROWS} of 131 classes are in the table only."
    assert told in drawn.get_supxlabel().replace("\n", " ")
    print_table(found, "x", Path("out/x"))
    assert re.search(r"\bc129 +priority\b", capsys.readouterr().out)


# ---- timelines --------------------------------------------------------------------------------------------------


def test_classes_of_one_priority_share_a_track_with_both_names(tmp_path: Path) -> None:
    loaded = load_config(write_config(tmp_path, config(FOUR)))
    assert class_names(loaded) == {0: "chat", 1: "agent, evaluation", 2: "batch"}
    (_, result), *_ = record(timeline_runs(loaded))
    events = trace_events(result.slices or [], loaded)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    slices = {event["tid"] for event in events if event["ph"] == "X"}
    assert list(tracks.values()) == ["chat", "agent, evaluation", "batch"]
    assert slices == set(tracks)


@pytest.mark.parametrize("n", [1, 3, 8, 12])
def test_every_priority_has_a_colour_of_its_own(n: int) -> None:
    key = timeline_key({priority: f"class {priority}" for priority in range(n)})
    prefills = [h for h, label in zip(key["handles"], key["labels"], strict=True) if label.endswith("prefill")]
    assert len({tuple(np.round(patch.get_facecolor(), 3)) for patch in prefills}) == n


@pytest.mark.parametrize("classes", [FOUR, LONG], ids=["short names", "long names"])
def test_the_key_of_a_schedule_stays_on_the_page(classes, tmp_path, monkeypatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    recorded = record(timeline_runs(load_config(write_config(tmp_path, config(classes)))))
    assert save_timeline(recorded, tmp_path / "timeline.png", "Simulated.")
    drawn[0].draw_without_rendering()
    legend = drawn[0].legends[0]
    box, page = legend.get_window_extent(), drawn[0].bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert len(legend.get_texts()) == 2 * 3 + 1


# ---- levels below LS --------------------------------------------------------------------------------------------


@given(worlds.traces(), st.sampled_from(["priority", "chunked", "hybrid", "slack"]), st.sampled_from([2, 8]))
@settings(max_examples=60, deadline=None)
def test_among_levels_below_ls_nobody_is_launched_before_who_is_more_urgent(
    trace: RequestTrace, policy: str, seqs: int
) -> None:
    limits = Limits(max_seqs=seqs, max_batched_tokens=64, kv_blocks=4000, block_size=4)
    steps = PassCostModel(affine_timings(layers=2, experts=4, top_k=2), max_step=1e-4)
    result = worlds.run(trace, make_policy(policy), limits, steps)
    level = np.array([worlds.PRIORITIES[name] for name in trace.classes])[trace.cls]
    for i in np.flatnonzero(level == 2):
        launched = result.first_launch[i]
        waited = (level == 1) & (result.arrival < launched)
        assert not (waited & (result.first_launch > launched)).any()


# ---- the command line -------------------------------------------------------------------------------------------


def test_three_classes_from_the_command_line_to_the_report(tmp_path: Path) -> None:
    three = {name: FOUR[name] for name in ("chat", "agent", "batch")}
    path = write_config(tmp_path, config(three))
    out = tmp_path / "out"
    options = ["--timeline", "--set", "policies=[priority, slack]", "--set", "seeds=1", "--jobs", "1"]
    done = CliRunner().invoke(app, ["simulate", str(path), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    assert re.findall(r"^ +50 +(\S+) +slack ", done.stdout, re.MULTILINE) == [*three, "(all)"]
    results = load_results(out)
    assert results.summary["class"].unique().tolist() == list(three)
    assert (results.summary.groupby("class", sort=False)["sent"].sum() > 0).all()
    events = json.loads((out / "timeline.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == set(three)
    assert {path.name for path in out.glob("*.png")} == {"ttft.png", "throughput.png", "slo.png", "timeline.png"}
    reported = CliRunner().invoke(app, ["report", str(out)])
    assert reported.exit_code == 0, reported.output
    text = (out / "report.html").read_text()
    assert "<h3>All classes</h3>" in text
    assert "e.g. chat slack" in text
    for name in three:
        assert f'data-value="{name}">{name}</td>' in text
