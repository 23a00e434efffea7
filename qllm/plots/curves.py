"""Figures: TTFT and SLO attainment against request rate, a line per policy, with a band over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from qllm.config.config import RATE
from qllm.experiment.metrics import band, good, per_request
from qllm.experiment.results import Results

# Okabe and Ito (2008), told apart by colour-blind readers; markers repeat the difference in black and white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_ttft(results: Results, column: str = "ttft_mean_s", cls: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw one TTFT column of the summary against the swept rate, a line per policy, on the axes returned.

    The band (mean TTFT only) is the 95 % t-interval over seeds; the dashed line the SLO of the class, in the same unit.

    Args:
        results: What a sweep gave.
        column: A TTFT column of the summary, in seconds or over the isolated TTFT.
        cls: The class; default: the most urgent one.
        ax: Where to draw; default: axes of a new figure.
    """
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    x = x_axis(results)
    for (label, style), lines in lines_of(results.summary[results.summary["class"] == cls], x):
        ax.plot(lines[x], lines[column], label=label, **style)
        if column == "ttft_mean_s":
            low = lines["ttft_mean_lo_s"].clip(lower=lines[column].min() / 100)
            ax.fill_between(lines[x], low, lines["ttft_mean_hi_s"], color=style["color"], alpha=0.15, linewidth=0)
    slo = results.config.classes[cls].slo
    limit = None
    if slo is not None:
        limit = slo.ttft_over_isolated if column == "ttft_over_isolated_p99" else slo.ttft
    if limit is not None:
        ax.axhline(limit, color="0.3", linestyle="--", linewidth=1, label=f"SLO {limit:g}{_unit(column)}")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(f"{cls} {_TITLES[column]}")
    finish_axes(ax, x)
    return ax


def plot_slo(results: Results, cls: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw SLO attainment (good / sent) against the swept rate, a line per policy, on the axes returned.

    The band is the 95 % t-interval over the seeds' attainments, cut off at 0 and 1.

    Args:
        results: What a sweep gave.
        cls: The class; default: the most urgent one.
        ax: Where to draw; default: axes of a new figure.
    """
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    x = x_axis(results)
    slos = {name: job.slo for name, job in results.config.classes.items()}
    values = per_request(results.requests[results.requests["class"] == cls])
    values["good"] = good(values, slos)
    for (label, style), lines in lines_of(values, x):
        at = lines.groupby(x, sort=True)
        mean = at["good"].mean()
        bands = [band(group.groupby("seed")["good"].mean().to_numpy()) for _, group in at]
        ax.plot(mean.index, mean, label=label, **style)
        low, high = np.clip(np.array(bands).T, 0, 1)
        ax.fill_between(mean.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.set_ylim(-0.02, 1.02)
    ax.set_ylabel(f"{cls} SLO attainment (good / sent)")
    finish_axes(ax, x)
    return ax


def save_figures(results: Results, out: str | Path, caption: str) -> list[Path]:
    """Write ttft.png, ttft.svg and, where a class has an SLO, slo.png and slo.svg into `out`; return their paths."""
    cls = most_urgent(results)
    slo = results.config.classes[cls].slo
    tail = "ttft_over_isolated_p99" if slo and slo.ttft_over_isolated else "ttft_p99_s"
    written = []
    figure = _figure(2)
    for ax, column in zip(figure.subplots(1, 2), ("ttft_mean_s", tail), strict=True):
        plot_ttft(results, column, cls, ax)
    written += _write(figure, Path(out) / "ttft", results, caption)
    with_slo = [name for name, job in results.config.classes.items() if job.slo is not None]
    if with_slo:
        figure = _figure(len(with_slo))
        for ax, name in zip(figure.subplots(1, len(with_slo), squeeze=False)[0], with_slo, strict=True):
            plot_slo(results, name, ax)
        written += _write(figure, Path(out) / "slo", results, caption)
    return written


def most_urgent(results: Results) -> str:
    """The class with the lowest priority number (the first of equals)."""
    classes = results.config.classes
    return min(classes, key=lambda name: classes[name].priority)


def x_axis(results: Results) -> str:
    """The swept key on the x axis: the rate, or the first other key with numbers if only that was swept."""
    swept = results.config.sweep
    others = [key for key in swept if key != RATE and len(swept[key]) > 1 and _numeric(results.summary[key])]
    return RATE if results.summary[RATE].nunique() > 1 or not others else others[0]


_TITLES = {
    "ttft_mean_s": "TTFT, mean (s)",
    "ttft_p50_s": "TTFT, median (s)",
    "ttft_p95_s": "TTFT, 95th percentile (s)",
    "ttft_p99_s": "TTFT, 99th percentile (s)",
    "ttft_over_isolated_p99": "TTFT / isolated TTFT, 99th percentile",
}


def lines_of(rows: pd.DataFrame, x: str) -> Iterator[tuple[tuple[str, dict[str, Any]], pd.DataFrame]]:
    """((label, style), rows sorted by `x`) per policy and per combination of the other swept keys."""
    fixed = [name for name in rows.columns if "." in name and name != x] + ([RATE] if x != RATE else [])
    groups = ["policy", *(name for name in fixed if rows[name].nunique() > 1)]
    for position, (key, group) in enumerate(rows.groupby(groups, sort=False, observed=True)):
        values = key if isinstance(key, tuple) else (key,)
        label = ", ".join([str(values[0]), *(f"{n}={v}" for n, v in zip(groups[1:], values[1:], strict=True))])
        style = {
            "color": COLOURS[position % len(COLOURS)],
            "marker": _MARKERS[position % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 1.5,
        }
        yield (label, style), group.sort_values(x)


def _numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values)


def _unit(column: str) -> str:
    return "x isolated" if column == "ttft_over_isolated_p99" else " s"


def finish_axes(ax: Axes, x: str) -> None:
    """Name the x axis, draw a light grid, leave the frame out."""
    ax.set_xlabel("request rate (requests/s)" if x == RATE else x)
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _figure(panels: int) -> Figure:
    """A figure without pyplot: no global state, no display, the same bytes for the same data."""
    figure = Figure(figsize=(1.2 + 4.2 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes() -> Axes:
    """Axes of a pyplot figure, as notebooks show them."""
    from matplotlib import pyplot  # only notebooks need pyplot and the window system that it may bring

    axes: Axes = pyplot.subplots(figsize=(5.4, 4.0), layout="constrained")[1]
    return axes


def add_caption(figure: Figure, caption: str | Results) -> None:
    """Write a caption below the panels of a figure.

    Args:
        figure: Any figure.
        caption: The text; or results, of which it says whether they are simulated, and on what.
    """
    text = caption if isinstance(caption, str) else _origin(caption.config.provenance["timings"])
    lines = textwrap.fill(text, int(18 * figure.get_figwidth()))  # about 18 letters an inch in this size
    figure.supxlabel(lines, fontsize=7, color="0.35")


def _origin(timings: str) -> str:
    """What a figure of results says: `timings` is the provenance of the step times, or names the real engine."""
    return f"Measured. {timings}" if timings.startswith("engine: real") else f"Simulated. Timings: {timings}"


def _write(figure: Figure, stem: Path, results: Results, caption: str) -> list[Path]:
    shown = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    add_caption(figure, caption)
    with matplotlib.rc_context({"svg.hashsalt": results.config.name, "svg.fonttype": "none"}):
        figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    return [stem.with_suffix(".png"), stem.with_suffix(".svg")]
