"""Figures of one point of a sweep: the distribution of a metric, policies side by side, and where the time goes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from qllm.config.yaml_lines import ConfigError
from qllm.experiment.metrics import per_request
from qllm.experiment.results import Results
from qllm.plots.curves import finish_axes, lines_of, most_urgent, new_axes, x_axis

#: Parts of a request's turnaround, in the order of the bars, with their colours (Okabe and Ito).
PARTS = {"queueing_s": "#E69F00", "suspended_s": "#CC79A7", "running_s": "#0072B2"}
#: Columns of `qllm.experiment.metrics.per_request` and how an axis names them.
PER_REQUEST = {
    "ttft_s": "TTFT (s)",
    "tpot_s": "TPOT (s)",
    "turnaround_s": "turnaround (s)",
    "blocking_s": "blocking (s)",
    "ttft_over_isolated": "TTFT / isolated TTFT",
}


def plot_cdf(
    results: Results, column: str = "ttft_s", cls: str | None = None, at: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the distribution of a metric over the requests *sent*, a line per policy, on the axes returned.

    A request without the value (rejected, unfinished) never counts as below, so such a line ends below 1. The x axis is
    logarithmic; zeros are left of it.

    Args:
        results: What a sweep gave.
        column: Key of `PER_REQUEST`.
        cls: The class; default: the most urgent one.
        at: Value of the swept key on the x axis of `plot_ttft`; default: the highest.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such column, class or swept value.
    """
    if column not in PER_REQUEST:
        raise ConfigError(f"plot_cdf: column is {column!r}; allowed: {', '.join(PER_REQUEST)}")
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    x, value, rows = _at(results, results.requests, cls, at)
    for (label, style), mine in lines_of(per_request(rows), x):
        ordered = np.sort(mine[column].dropna().to_numpy())
        share = np.arange(1, len(ordered) + 1) / len(mine)
        ax.step(ordered, share, where="post", label=label, color=style["color"], linewidth=1.5)
    finish_axes(ax, x)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(0, 1.01)
    ax.set_xlabel(f"{cls} {PER_REQUEST[column]}, {_titled(x, value)}")
    ax.set_ylabel("share of requests sent")
    return ax


def plot_ablation(
    results: Results,
    column: str = "ttft_p99_s",
    cls: str | None = None,
    at: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one column of the summary at one point: a bar with its number per policy, the first policy on top.

    Args:
        results: What a sweep gave.
        column: One of qllm.experiment.metrics.SUMMARY_COLUMNS.
        cls: The class; default: the most urgent one.
        at: Value of the swept key on the x axis of `plot_ttft`; default: the highest.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such column, class or swept value.
    """
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    if column not in results.summary:
        raise ConfigError(f"plot_ablation: no column {column!r} in the summary")
    x, value, rows = _at(results, results.summary, cls, at)
    bars = [(label, style["color"], float(mine[column].iloc[0])) for (label, style), mine in lines_of(rows, x)]
    labels, colours, heights = zip(*bars, strict=True)
    drawn = ax.barh(labels, heights, color=colours, height=0.7)
    ax.bar_label(drawn, [f"{height:.3g}" for height in heights], padding=3, fontsize=8)
    ax.margins(x=0.15)
    _bars(ax, f"{cls} {column}, {_titled(x, value)}")
    return ax


def plot_time_spent(results: Results, cls: str | None = None, at: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw mean turnaround of finished requests in seconds, a bar per policy: queueing, suspended, running.

    Args:
        results: What a sweep gave.
        cls: The class; default: the most urgent one.
        at: Value of the swept key on the x axis of `plot_ttft`; default: the highest.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such class or swept value.
    """
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    x, value, rows = _at(results, results.requests, cls, at)
    means = [(label, mine[list(PARTS)].mean()) for (label, _), mine in lines_of(rows[rows["finish_s"].notna()], x)]
    left = np.zeros(len(means))
    for part, colour in PARTS.items():
        widths = np.array([mean[part] for _, mean in means])
        ax.barh([label for label, _ in means], widths, left=left, color=colour, height=0.7, label=part[:-2])
        left += widths
    _bars(ax, f"mean {cls} turnaround (s), {_titled(x, value)}")
    return ax


def _at(results: Results, table: pd.DataFrame, cls: str, at: float | None) -> tuple[str, float, pd.DataFrame]:
    """(swept key, its value, rows of that point and class)."""
    x = x_axis(results)
    values = sorted(results.summary[x].unique())
    value = values[-1] if at is None else at
    if value not in values:
        raise ConfigError(f"{x} is {value:g}; allowed: {', '.join(f'{v:g}' for v in values)}, as swept")
    if cls not in results.config.classes:
        raise ConfigError(f"class is {cls!r}; allowed: {', '.join(results.config.classes)}")
    return x, value, table[(table[x] == value) & (table["class"] == cls)]


def _titled(x: str, value: float) -> str:
    return f"{value:g} requests/s" if x == "rate" else f"{x} = {value:g}"


def _bars(ax: Axes, title: str) -> None:
    ax.invert_yaxis()
    ax.set_xlabel(title)
    ax.grid(True, axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
