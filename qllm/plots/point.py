"""Figures of one point of a sweep: the distribution of a metric, policies side by side, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qllm.config.yaml_lines import ConfigError
from qllm.experiment.results import Results
from qllm.plots.lines import in_words, lines_of, most_urgent, other_keys, titles, x_axis
from qllm.plots.style import finish_axes, log_axis, new_axes

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
    results: Results,
    column: str = "ttft_s",
    cls: str | None = None,
    at: float | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the distribution of a metric over the requests *sent*, a line per policy, on the axes returned.

    A request without the value (rejected, unfinished) never counts as below, so such a line ends below 1. The x axis is
    logarithmic; zeros are left of it. Later lines are thinner, so that one that lies on another leaves both visible.

    Args:
        results: What a sweep gave.
        column: Key of `PER_REQUEST`.
        cls: The class; default: the most urgent one.
        at: Value of the swept key on the x axis of `plot_ttft`; default: the highest number or last text.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such column, class or swept value.
    """
    if column not in PER_REQUEST:
        raise ConfigError(f"plot_cdf: column is {column!r}; allowed: {', '.join(PER_REQUEST)}")
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    x, value, rows = _at(results, results.counted, cls, at)
    lines = list(_lines(results, rows, x))
    for number, ((label, style), mine) in enumerate(lines, start=1):
        ordered = np.sort(mine[column].dropna().to_numpy())
        share = np.arange(1, len(ordered) + 1) / len(mine)
        shown = {
            "color": style["color"],
            "linestyle": style["linestyle"],
            "linewidth": 1.2 + 0.4 * (len(lines) - number),
        }
        ax.step(ordered, share, where="post", label=label, **shown)
    finish_axes(ax, x)
    if (rows[column] > 0).any():
        log_axis(ax.xaxis)
    ax.set_ylim(0, 1.01)
    ax.set_xlabel(f"{cls} {PER_REQUEST[column]}, {in_words(x, value)}")
    ax.set_ylabel("share of requests sent")
    return ax


def plot_ablation(
    results: Results,
    column: str = "ttft_p99_s",
    cls: str | None = None,
    at: float | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one column of the summary at one point: a bar with its number per policy, the first policy on top.

    Args:
        results: What a sweep gave.
        column: One of qllm.experiment.metrics.SUMMARY_COLUMNS.
        cls: The class; default: the most urgent one.
        at: Value of the swept key on the x axis of `plot_ttft`; default: the highest number or last text.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such column, class or swept value.
    """
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    if column not in results.summary:
        raise ConfigError(f"plot_ablation: no column {column!r} in the summary")
    x, value, rows = _at(results, results.summary, cls, at)
    bars = [(label, style["color"], float(mine[column].iloc[0])) for (label, style), mine in _lines(results, rows, x)]
    labels, colours, heights = zip(*bars, strict=True)
    drawn = ax.barh(labels, heights, color=colours, height=0.7)
    ax.bar_label(drawn, [f"{height:.3g}" for height in heights], padding=3, fontsize=8)
    ax.margins(x=0.15)
    _bars(ax, f"{cls} {column}, {in_words(x, value)}")
    return ax


def plot_time_spent(
    results: Results, cls: str | None = None, at: float | str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw mean turnaround of finished requests in seconds, a bar per policy: queueing, suspended, running.

    Args:
        results: What a sweep gave.
        cls: The class; default: the most urgent one.
        at: Value of the swept key on the x axis of `plot_ttft`; default: the highest number or last text.
        ax: Where to draw; default: axes of a new figure.

    Raises:
        ConfigError: There is no such class or swept value.
    """
    ax = ax or new_axes()
    cls = cls or most_urgent(results)
    x, value, rows = _at(results, results.counted, cls, at)
    finished = rows[rows["finish_s"].notna()]
    means = [(label, mine[list(PARTS)].mean()) for (label, _), mine in _lines(results, finished, x)]
    left = np.zeros(len(means))
    for part, colour in PARTS.items():
        widths = np.array([mean[part] for _, mean in means])
        ax.barh([label for label, _ in means], widths, left=left, color=colour, height=0.7, label=part[:-2])
        left += widths
    _bars(ax, f"mean {cls} turnaround (s), {in_words(x, value)}")
    return ax


def _lines(results: Results, rows: pd.DataFrame, x: str) -> Iterator[tuple[tuple[str, dict[str, Any]], pd.DataFrame]]:
    return lines_of(rows, x, other_keys(results), titles(results))


def _at(
    results: Results, table: pd.DataFrame, cls: str, at: float | str | None
) -> tuple[str, float | str, pd.DataFrame]:
    """(swept key, its value, rows of that point and class)."""
    x = x_axis(results)
    values = results.summary[x].unique().tolist()
    if pd.api.types.is_numeric_dtype(results.summary[x]):
        values.sort()
    value = values[-1] if at is None else at
    if value not in values:
        allowed = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        raise ConfigError(f"{in_words(x, value)} was not swept; allowed: {allowed}")
    if cls not in results.config.classes:
        raise ConfigError(f"class is {cls!r}; allowed: {', '.join(results.config.classes)}")
    return x, value, table[(table[x] == value) & (table["class"] == cls)]


def _bars(ax: Axes, title: str) -> None:
    ax.invert_yaxis()
    ax.set_xlabel(title)
    ax.grid(True, axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
