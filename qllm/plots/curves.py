"""Figures of a sweep: what each class gets under each policy, against what was swept, with a band over the seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qllm.config.yaml_lines import ConfigError
from qllm.experiment.estimates import bootstrap, percentile
from qllm.experiment.metrics import BOUNDS, span
from qllm.experiment.results import Results
from qllm.plots.lines import (
    lines_of,
    most_urgent,
    name_places,
    other_keys,
    places_of,
    spread_out,
    titles,
    x_axis,
)
from qllm.plots.notes import bounds_of, notes, told
from qllm.plots.style import (
    SATURATED,
    add_caption,
    draw_line,
    finish_axes,
    hollow_sign,
    legend_columns,
    log_axis,
    new_axes,
    new_figure,
    part_lines,
)

MOST_FACETS = 8  #: combinations of further swept values that one figure shows
MOST_ROWS = 16  #: of panels: of more classes, and of more classes times combinations, the figure shows the first
_BOUND: dict[str, Any] = {"color": "0.3", "linestyle": "--", "linewidth": 1}
_LETTERS = 36  #: that the side of a panel has room for


class _Metric(NamedTuple):
    """A column of the summary in figures: its title, the values of a run that it sums up, and how."""

    title: str
    column: str
    statistic: Callable[[np.ndarray], float]
    scale: str = "log"


def _tail(percent: float) -> Callable[[np.ndarray], float]:
    return lambda values: percentile(values, percent)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _ratio(values: np.ndarray) -> float:
    done, seconds = values.sum(axis=0)
    return float(done / seconds) if seconds > 0 else float("nan")


_METRICS = {
    "ttft_mean_s": _Metric("TTFT, mean (s)", "ttft_s", _mean),
    "ttft_p50_s": _Metric("TTFT, median (s)", "ttft_s", _tail(50)),
    "ttft_p95_s": _Metric("TTFT, p95 (s)", "ttft_s", _tail(95)),
    "ttft_p99_s": _Metric("TTFT, p99 (s)", "ttft_s", _tail(99)),
    "ttft_over_isolated_p99": _Metric("TTFT / isolated TTFT, p99", "ttft_over_isolated", _tail(99)),
    "turnaround_mean_s": _Metric("turnaround, mean (s)", "turnaround_s", _mean),
    "throughput_rps": _Metric("throughput (requests/s)", "finished", _ratio, "from 0"),
    "slo_attainment": _Metric("SLO attainment (good / sent)", "good", _mean, "share"),
    "slo_ttft_met": _Metric("TTFT bound met (of sent)", "slo_ttft_met", _mean, "share"),
    "slo_ttft_over_isolated_met": _Metric(
        "TTFT / isolated bound met (of sent)", "slo_ttft_over_isolated_met", _mean, "share"
    ),
    "slo_tpot_met": _Metric("TPOT bound met (of sent)", "slo_tpot_met", _mean, "share"),
    "slo_e2e_met": _Metric("turnaround bound met (of sent)", "slo_e2e_met", _mean, "share"),
}
#: the bound of an SLO that is drawn as a line, by what the name of a column begins with
_BOUND_OF = {"ttft_over_isolated": ("ttft_over_isolated", "x isolated"), "ttft_": ("ttft", " s")}


def plot_ttft(results: Results, column: str = "ttft_mean_s", cls: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw one TTFT column of the summary against what was swept, a line per policy, on the axes returned.

    The band is the 95 % bootstrap over seeds, the dashed line the bound of the class. Hollow: saturated.

    Args:
        results: What a sweep gave.
        column: A TTFT column of the summary, in seconds or over the isolated TTFT.
        cls: The class; default: the most urgent one.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such column or class.
    """
    return _plot(results, "plot_ttft", column, [name for name in _METRICS if name.startswith("ttft")], cls, ax)


def plot_slo(results: Results, cls: str | None = None, ax: Axes | None = None, column: str = "slo_attainment") -> Axes:
    """Draw SLO attainment (good / sent) against what was swept, a line per policy, on the axes returned.

    The band is the 95 % bootstrap over seeds. Hollow: saturated.

    Args:
        results: What a sweep gave.
        cls: The class; default: the most urgent one.
        ax: Where to draw; default: axes of a new figure.
        column: "slo_attainment", or the column of the summary for one bound, such as "slo_tpot_met".

    Raises:
        ConfigError: There is no such column or class.
    """
    return _plot(results, "plot_slo", column, [name for name in _METRICS if name.startswith("slo")], cls, ax)


def _plot(results: Results, name: str, column: str, allowed: list[str], cls: str | None, ax: Axes | None) -> Axes:
    cls = cls or most_urgent(results)
    if column not in allowed:
        raise ConfigError(f"{name}: column is {column!r}; allowed: {', '.join(allowed)}")
    if cls not in results.config.classes:
        raise ConfigError(f"class is {cls!r}; allowed: {', '.join(results.config.classes)}")
    ax = ax or new_axes()
    part_lines(ax, _draw(results, column, cls, ax))
    return ax


def save_figures(results: Results, out: str | Path, caption: str, policies: Sequence[str] = ()) -> list[Path]:
    """Write the figures of a sweep as PNG and SVG, a row of panels per class.

    They are "ttft" (mean and tail), "throughput" (turnaround and throughput) and, where a class has an SLO, "slo"
    (attainment, and by bound where a class has several).

    Args:
        results: What a sweep gave.
        out: The folder, which exists.
        caption: Where the step times come from, below each figure; what the figure's signs mean is added.
        policies: In the order of their colours, so that figures of several results agree; default: those of `results`.

    Returns:
        The paths of the files.
    """
    classes = results.config.classes
    tails = {
        name: "ttft_over_isolated_p99" if bounds_of(results, name)["ttft_over_isolated"] else "ttft_p99_s"
        for name in classes
    }
    figures: dict[str, dict[str, list[str]]] = {
        "ttft": {name: ["ttft_mean_s", tails[name]] for name in classes},
        "throughput": {name: ["turnaround_mean_s", "throughput_rps"] for name in classes},
    }
    given = {name: [BOUNDS[key] for key, values in bounds_of(results, name).items() if values] for name in classes}
    slo = {name: columns for name, columns in given.items() if columns}
    if any(len(columns) > 1 for columns in slo.values()):  # then all bounds together first, comparable among classes
        slo = {name: ["slo_attainment", *(columns if len(columns) > 1 else [])] for name, columns in slo.items()}
    if slo:
        figures["slo"] = slo
    written = []
    for stem, panels in figures.items():
        figure = _panels(results, panels, caption, policies)
        with matplotlib.rc_context({"svg.hashsalt": results.config.name, "svg.fonttype": "none"}):
            for suffix, settings in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
                path = Path(out) / f"{stem}{suffix}"
                figure.savefig(path, dpi=150, metadata=settings)
                written.append(path)
                figure.set_layout_engine("none")  # the second file has the layout of the first
    return written


def _panels(results: Results, panels: dict[str, list[str]], caption: str, policies: Sequence[str]) -> Figure:
    """A figure with a row of panels per class, and as many rows again for each further combination of swept values."""
    keys = other_keys(results)
    unique = results.summary[keys].drop_duplicates().itertuples(index=False, name=None) if keys else [()]
    facets = [dict(zip(keys, values, strict=True)) for values in unique]
    no_room, panels = list(panels)[MOST_ROWS:], dict(list(panels.items())[:MOST_ROWS])
    most = min(MOST_FACETS, max(1, MOST_ROWS // len(panels)))
    combinations, facets = len(facets), facets[:most]
    columns = max(map(len, panels.values()))
    figure = new_figure(1.2 + 4.2 * columns, 1.2 + 3.1 * len(facets) * len(panels))
    grid = figure.subplots(len(facets) * len(panels), columns, squeeze=False)
    drawn: list[tuple[str, str, Axes, list[list[Artist]]]] = []
    for row, (facet, cls) in enumerate((facet, cls) for facet in facets for cls in panels):
        for ax, column in zip(grid[row], panels[cls], strict=False):
            drawn.append((cls, column, ax, _draw(results, column, cls, ax, facet, policies)))
            ax.set_title(", ".join(told(results, *swept) for swept in facet.items()), fontsize=9, loc="left")
        for ax in grid[row][len(panels[cls]) :]:
            ax.set_axis_off()
    for place in dict.fromkeys((cls, column) for cls, column, *_ in drawn):
        alike = [ax for cls, column, ax, _ in drawn if (cls, column) == place]
        lows, highs = zip(*(ax.get_ylim() for ax in alike), strict=True)
        for ax in alike:
            ax.set_ylim(min(lows), max(highs))
            if ax.get_yscale() == "log":
                log_axis(ax.yaxis)  # numbers for the limits that it has now
    parted = [part_lines(ax, lines) for _, _, ax, lines in drawn]
    hollow = any(artist.get_label() == SATURATED for *_, lines in drawn for line in lines for artist in line)
    _legend(figure, hollow)
    said = notes(results, columns={column for _, column, *_ in drawn}, hollow=hollow, parted=any(parted))
    if combinations > most:
        said.append(f"{combinations - most} of {combinations} combinations of swept values are in the table only.")
    if no_room:
        said.append(f"{len(no_room)} of {len(no_room) + len(panels)} classes are in the table only.")
    add_caption(figure, " ".join([f"{caption.rstrip('.')}.", *said]))
    return figure


def _legend(figure: Figure, hollow: bool) -> None:
    shown = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    bounds = [label for label, line in shown.items() if _is_bound(line)]
    if len(bounds) > 1:  # all look alike: which is which say the panels and the caption
        shown["SLO of the class"], *_ = [shown.pop(label) for label in bounds]
    if hollow:
        shown["saturated"] = hollow_sign()
    columns = legend_columns(list(shown), figure.get_figwidth(), most=5)
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _draw(
    results: Results,
    column: str,
    cls: str,
    ax: Axes,
    facet: Mapping[str, Any] | None = None,
    policies: Sequence[str] = (),
) -> list[list[Artist]]:
    """Draw a column of the summary for one class; returns the artists of each line, which may coincide with others.

    `facet`: only these values of further swept keys; else each combination of them has lines of its own.
    """
    x, metric = x_axis(results), _METRICS[column]
    rows = _at(results.summary[results.summary["class"] == cls], facet or {})
    keys = [key for key in other_keys(results) if key not in (facet or {})]
    found = list(lines_of(rows, x, keys, policies or titles(results)))
    bands = _bands(results, column, cls)
    lines = []
    for number, ((label, style), line) in enumerate(found):
        at = places_of(results, x, line[x], number, len(found))
        values = line[column].to_numpy(dtype=float)
        low, high = np.array([bands.get(key, (np.nan, np.nan)) for key in _keys(results, line)]).T
        full = line["saturated"].to_numpy(dtype=bool)
        lines.append(draw_line(ax, at, values, (low, high), full, label, style, joined=spread_out(results, x)))
    if column == "throughput_rps" and spread_out(results, x):
        _draw_offered(results, cls, facet or {}, x, ax)
    _draw_bound(results, cls, column, ax)
    label = f"{cls} {metric.title}"
    ax.set_ylabel(label if len(label) <= _LETTERS else f"{textwrap.fill(cls, _LETTERS - 4)}\n{metric.title}")
    finish_axes(ax, x)
    name_places(results, x, [label for (label, _), _ in found], ax)
    if metric.scale == "share":
        ax.set_ylim(-0.05, 1.05)
    elif metric.scale == "from 0":
        ax.set_ylim(0, 1.06 * ax.dataLim.y1 if ax.dataLim.y1 > 0 else 1)
    elif (rows[column] > 0).any():
        log_axis(ax.yaxis)
    if not rows[column].notna().any():
        ax.text(0.5, 0.5, "no request has this value", transform=ax.transAxes, ha="center", color="0.4", fontsize=9)
    return lines


def _draw_bound(results: Results, cls: str, column: str, ax: Axes) -> None:
    """The bound of the class as a line, where it is of the column's unit and the same at all points."""
    key, unit = next((bound for start, bound in _BOUND_OF.items() if column.startswith(start)), (None, ""))
    bounds = bounds_of(results, cls)[key] if key else []
    if len(bounds) == 1:
        ax.axhline(bounds[0], **_BOUND, label=f"SLO {bounds[0]:g}{unit}")


def _is_bound(line: Artist) -> bool:
    return isinstance(line, Line2D) and (line.get_color(), line.get_linestyle()) == (_BOUND["color"], "--")


def _draw_offered(results: Results, cls: str, facet: Mapping[str, Any], x: str, ax: Axes) -> None:
    """What the class sends, in requests per second between the first arrival and the last of any class."""
    rows = _at(results.counted, facet)
    rows = rows[rows["policy"] == rows["policy"].iloc[0]] if len(rows) else rows
    sent = rows[rows["class"] == cls].groupby(x).size()
    runs = rows.groupby([x, *(key for key in other_keys(results) if key not in facet), "seed"])["arrival_s"]
    seconds = (runs.max() - runs.min()).groupby(level=0).sum()
    offered = (sent / seconds.where(seconds > 0)).dropna()
    ax.plot(offered.index, offered, color="0.4", linestyle=":", linewidth=1.2, label="offered", zorder=3)


def _bands(results: Results, column: str, cls: str) -> dict[tuple[Any, ...], tuple[float, float]]:
    """The 95 % bands over the seeds, by policy and point."""
    metric, by_run = _METRICS[column], [*results.point_columns, "seed"]
    mine = results.counted[results.counted["class"] == cls]
    seeds: dict[tuple[Any, ...], list[np.ndarray]] = {}
    if metric.column == "finished":
        done = mine.groupby(by_run, sort=False, observed=True)["finish_s"].count()
        times = results.counted[[*by_run, "arrival_s", "finish_s"]]
        for key, run in times.groupby(by_run, sort=False, observed=True):
            seeds.setdefault(key[:-1], []).append(np.array([[done.get(key, 0), span(run)]]))
    else:
        for key, values in mine.groupby(by_run, sort=False, observed=True)[metric.column]:
            seeds.setdefault(key[:-1], []).append(values.dropna().to_numpy())
    return {key: bootstrap(values, metric.statistic) for key, values in seeds.items()}


def _keys(results: Results, rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(rows[results.point_columns].itertuples(index=False, name=None))


def _at(table: pd.DataFrame, facet: Mapping[str, Any]) -> pd.DataFrame:
    for key, value in facet.items():
        table = table[table[key] == value]
    return table
