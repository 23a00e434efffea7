"""A picture of a schedule: each pass climbs from layer 0 to the last; a suspended one waits where it stopped."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from qllm.config.from_config import cost_model
from qllm.experiment.run import Run
from qllm.plots.perfetto import class_names
from qllm.plots.style import COLOURS, add_caption, legend_columns, new_axes, new_figure
from qllm.traces.results import PassSlice, RunResult

_PREFILL, _DECODE = 0.85, 0.35  #: opacity of passes with a prefill in them, and of those that only decode
_SHOWN = 24  #: slices in a panel of `save_timeline`
_OTHER = "0.6"  #: colour of priorities without a name
_LETTERS = 40  #: in a line of the legend
_DOTTED: Any = (0, (1.5, 1.2))
_STOP: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 4.5, "mfc": "w", "mec": "k"}


def plot_timeline(
    slices: Iterable[PassSlice],
    names: Mapping[int, str],
    *,
    layers: int,
    requests: Iterable[tuple[int, float, float]] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw one run's schedule: seconds on the x axis, layers done on the y axis; a slice climbs in a straight line.

    `names`: priority -> class, or classes. A pass has the colour of its most urgent class, grey where that has no name.
    `requests`: (priority, arrival, first token) in seconds, bars below. `ax`: by default of a new figure.
    """
    ax = ax or new_axes()
    colours = _colours(names)
    passes: dict[int, list[PassSlice]] = {}
    for one in sorted(slices):
        passes.setdefault(one.pass_id, []).append(one)
    for priority in sorted({p[0].priority for p in passes.values()}, reverse=True):  # the most urgent on top
        mine = [p for p in passes.values() if p[0].priority == priority]
        _draw_passes(ax, mine, layers, colours.get(priority, _OTHER))
    floor = _draw_requests(ax, requests, layers, colours)
    ends = [one.end for slices_of_pass in passes.values() for one in slices_of_pass]
    ax.set_xlim(0, max(ends, default=1.0) * 1.01)
    ax.set_ylim(floor, layers)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_yticks([0, layers // 2, layers])
    ax.set_ylabel("layer")
    ax.set_xlabel("time (s)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _draw_passes(ax: Axes, passes: list[list[PassSlice]], layers: int, colour: str) -> None:
    """Passes of one colour, each a list of its slices: the area under the climb, and dots where it waits suspended."""
    for prefills, opacity, width in ((True, _PREFILL, 1.0), (False, _DECODE, 0.4)):
        shapes = [_climb(one, layers) for p in passes for one in p if bool(one.prefills) == prefills]
        ax.add_collection(PolyCollection(shapes, facecolors=colour, alpha=opacity, linewidths=0))
        ax.add_collection(LineCollection([shape[1:3] for shape in shapes], colors=colour, linewidths=width))
    waits = [[(one.end, one.layer), (other.start, other.first_layer)] for p in passes for one, other in pairwise(p)]
    ax.add_collection(LineCollection(waits, colors="k", linestyles=_DOTTED, linewidths=1.4, zorder=4))
    ax.plot([x for (x, _), _ in waits], [y for (_, y), _ in waits], **_STOP, zorder=5)


def _draw_requests(
    ax: Axes, requests: Iterable[tuple[int, float, float]], layers: int, colours: Mapping[int, str]
) -> float:
    """A bar from arrival to first token per request, below layer 0, in few lanes; returns where the lowest ends."""
    lanes: list[float] = []  # when each is free again
    height = 0.085 * layers
    for priority, arrival, token in sorted(requests, key=lambda request: (request[0], request[1])):
        end = token if token == token else arrival  # nan: none came
        lane = next((i for i, free in enumerate(lanes) if free < arrival), len(lanes))
        lanes[lane:] = [end, *lanes[lane + 1 :]]
        y = -height * (lane + 0.8)
        colour = colours.get(priority, _OTHER)
        ax.plot([arrival, end], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        ax.plot([arrival], [y], "^", ms=6, color=colour, clip_on=False)
        if token == token:
            ax.plot([end], [y], "|", ms=8, mew=2, color=colour)
            text = f"TTFT {1e3 * (end - arrival):,.0f} ms"
            ax.annotate(text, (end, y), (6, 0), textcoords="offset points", fontsize=8, va="center", color="0.2")
    return -height * (len(lanes) + 0.4) if lanes else 0.0


def timeline_key(names: Mapping[int, str]) -> dict[str, Any]:
    """Arguments of `legend` that explain the signs of `plot_timeline`."""
    colours = _colours(names)
    signs: dict[str, Any] = {}
    for priority, colour in colours.items():
        signs[textwrap.fill(f"{names[priority]} prefill", _LETTERS)] = Patch(color=colour, alpha=_PREFILL)
        signs[textwrap.fill(f"{names[priority]} decode", _LETTERS)] = Patch(facecolor=colour, alpha=_DECODE)
    signs["suspended, state kept"] = Line2D([], [], color="k", **{**_STOP, "linestyle": _DOTTED})
    signs["arrival to first token"] = Line2D([], [], color=next(iter(colours.values())), lw=2.5, marker="^", ms=6)
    return {"handles": list(signs.values()), "labels": list(signs), "handlelength": 2.4}


def _colours(names: Mapping[int, str]) -> dict[int, Any]:
    """A colour of its own for each priority."""
    many = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(names)))
    return dict(zip(sorted(names), COLOURS if len(names) <= len(COLOURS) else many, strict=False))


def _climb(one: PassSlice, layers: int) -> list[tuple[float, float]]:
    """The area below the line from the layer where the slice began to the one where it ended."""
    top = min(one.layer, layers)
    return [(one.start, 0), (one.start, one.first_layer), (one.end, top), (one.end, 0)]


def save_timeline(
    recorded: Sequence[tuple[Run, RunResult]], path: str | Path, caption: str, layers: int | None = None
) -> bool:
    """Write a picture of a panel per recorded run, around the first suspension in any of them, else the start.

    `caption`: simulated or measured, and on what. `layers`: by default of the configuration's timing trace, as in a
    simulation. Of several GPUs the first is shown. Returns False, and writes nothing, where nothing ran.
    """
    shown = [(run, [one for one in result.slices or [] if one.replica == 0]) for run, result in recorded]
    if not any(slices for _, slices in shown):
        return False
    start, end = _window([slices for _, slices in shown])
    classes = class_names(recorded[0][0].config)
    figure = new_figure(9, 1.2 + 2.0 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (run, slices) in zip(panels, shown, strict=True):
        inside = [one for one in slices if one.end >= start and one.start <= end]
        plot_timeline(inside, classes, layers=layers or cost_model(run.config).layers, ax=ax)
        several = f", the first of {run.config.replicas} GPUs" if run.config.replicas > 1 else ""
        ax.set_title(f"{run}{several}", fontsize=10, loc="left")
        ax.set_xlabel("")
    panels[-1].set_xlabel("time (s)")
    panels[-1].set_xlim(start, end)
    key = timeline_key(classes)
    key = {**key, "handles": key["handles"][:-1], "labels": key["labels"][:-1]}
    columns = legend_columns(key["labels"], 9.0, len(classes) + 1)  # prefill above decode, where there is room
    figure.legend(**key, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    signs = "A pass has the colour of the most urgent class in it, and the dark one where anybody's prefill is in it."
    add_caption(figure, f"{signs} {caption}")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _window(schedules: list[list[PassSlice]]) -> tuple[float, float]:
    """The seconds that `_SHOWN` slices take around the first suspension, or from the start where there is none."""
    for slices in schedules:
        at = next((i for i, one in enumerate(slices) if one.suspended), None)
        if at is not None:
            around = slices[max(0, at - _SHOWN // 4) :][:_SHOWN]
            return around[0].start, around[-1].end
    first = next(slices for slices in schedules if slices)[:_SHOWN]
    return first[0].start, first[-1].end
