"""The picture of a schedule: passes climb, stop at their layer, and go on from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from qllm.config.config import load_config
from qllm.plots.perfetto import record, timeline_runs
from qllm.plots.schedule import plot_timeline, save_timeline
from qllm.sim import PassSlice
from tests.cli_support import write_config


def pass_slice(
    start: float, end: float, pass_id: int, priority: int, layers: tuple[int, int], decodes: int = 0
) -> PassSlice:
    first, last = layers
    stopped = last < 8
    prefills = 0 if decodes else 1
    return PassSlice(
        start, end, pass_id, priority, prefills, decodes, 100, first, last, first, last, "experts", stopped
    )


SCHEDULE = [
    pass_slice(0.0, 1.0, 0, 1, (0, 3)),
    pass_slice(1.0, 1.5, 1, 0, (0, 8)),
    pass_slice(1.5, 1.6, 2, 0, (0, 8), decodes=2),
    pass_slice(1.6, 3.0, 0, 1, (3, 8)),
]


def drawn(requests=()):
    return plot_timeline(SCHEDULE, {0: "ls", 1: "be"}, layers=8, requests=requests, ax=Figure().subplots())


def test_a_suspended_pass_goes_on_at_the_layer_where_it_stopped() -> None:
    areas, climbs, waits = [], [], []
    for collection in drawn().collections:
        for path in collection.get_paths():
            points = [tuple(map(float, point)) for point in path.vertices]
            (areas if len(points) > 2 else climbs if collection.get_zorder() < 4 else waits).append(points)
    assert ((0.0, 0.0), (1.0, 3.0)) in {tuple(climb) for climb in climbs}
    assert ((1.6, 3.0), (3.0, 8.0)) in {tuple(climb) for climb in climbs}
    assert len(climbs) == len(areas) == len(SCHEDULE)
    assert waits == [[(1.0, 3.0), (1.6, 3.0)]]


def test_classes_and_kinds_of_pass_look_different() -> None:
    polygons = [c for c in drawn().collections if c.get_paths() and len(c.get_paths()[0].vertices) > 2]
    colours = {tuple(np.round(c.get_facecolor()[0], 3)) for c in polygons}
    assert len(colours) == 3  # ls prefill, ls decode, be prefill
    unnamed = plot_timeline(SCHEDULE, {}, layers=8, ax=Figure().subplots())
    rgb = {tuple(c.get_facecolor()[0][:3]) for c in unnamed.collections if len(c.get_facecolor())}
    assert rgb == {(0.6, 0.6, 0.6)}


def test_requests_are_bars_from_arrival_to_first_token_in_lanes_of_their_own() -> None:
    ax = drawn([(0, 0.9, 1.5), (0, 1.0, 1.5), (0, 2.0, float("nan"))])
    bars = [line.get_data() for line in ax.get_lines() if len(line.get_xdata()) == 2 and line.get_ydata()[1] < 0]
    assert [tuple(x) for x, _ in bars] == [(0.9, 1.5), (1.0, 1.5), (2.0, 2.0)]
    first, second, third = (y[0] for _, y in bars)
    assert second < first == third < 0
    assert [text.get_text() for text in ax.texts] == ["TTFT 600 ms", "TTFT 500 ms"]
    assert ax.get_ylim()[0] < second


def test_a_simulation_is_drawn_with_a_panel_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **settings: figures.append(self))
    recorded = record(timeline_runs(load_config(write_config(tmp_path))))
    assert save_timeline(recorded, tmp_path / "timeline.png", "Timings: affine: modelled")
    (figure,) = figures
    fcfs, qllm = (ax.get_title(loc="left") for ax in figure.axes)
    assert fcfs == "policy fcfs at rate=50, seed=0"
    assert qllm == "policy qllm at rate=50, seed=0"
    assert "modelled" in figure.get_supxlabel()
    left, right = figure.axes[1].get_xlim()
    stops = [s.end for s in recorded[1][1].slices or [] if s.suspended]
    assert left < stops[0] < right
    assert not save_timeline([], tmp_path / "none.png", "")


def test_the_layers_are_those_of_the_model_that_ran_and_the_caption_says_what_it_is(tmp_path, monkeypatch) -> None:
    """A run of the engine names a timing trace in its configuration, whose model it need not be."""
    loaded = load_config(write_config(tmp_path))
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    recorded = record(timeline_runs(loaded))
    save_timeline(recorded, tmp_path / "timeline.png", "Measured on a toaster", layers=8)
    assert figures[0].axes[0].get_ylim()[1] == 8
    assert "Measured on a toaster" in figures[0].get_supxlabel()
    assert "imulated" not in figures[0].get_supxlabel()
