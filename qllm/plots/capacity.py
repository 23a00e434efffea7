"""The figure of a search for capacity: attainment against the rate for each class, the capacities marked."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qllm.capacity.tables import Capacity
from qllm.plots.style import (
    add_caption,
    draw_line,
    finish_axes,
    hollow_sign,
    legend_columns,
    new_figure,
    part_lines,
    style_of,
)

MOST_FACETS = 4  #: combinations of swept values that the figure shows


def save_capacity(found: Capacity, out: str | Path, caption: str) -> list[Path]:
    """Write capacity.png and capacity.svg to the folder `out`, which exists; return their paths.

    Left, a bar per policy with its interval, and the rate at which it saturates. Right, the share of each class within
    its SLO at the rates that were simulated whole; a vertical line marks the capacity of each policy.

    Args:
        found: What the search gave.
        out: The folder.
        caption: Where the step times come from.
    """
    figure = draw_capacity(found, caption)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": found.config.name, "svg.fonttype": "none"}):
        for suffix, settings in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            path = Path(out) / f"capacity{suffix}"
            figure.savefig(path, dpi=150, metadata=settings)
            written.append(path)
            figure.set_layout_engine("none")
    return written


def draw_capacity(found: Capacity, caption: str) -> Figure:
    """The figure that `save_capacity` writes."""
    swept = list(found.config.sweep)
    unique = found.capacity[swept].drop_duplicates().itertuples(index=False, name=None) if swept else [()]
    facets = [dict(zip(swept, values, strict=True)) for values in unique]
    shown = facets[:MOST_FACETS]
    classes = [name for name, job in found.config.classes.items() if job.slo is not None]
    figure = new_figure(4.4 + 4.2 * len(classes), 1.4 + 3.2 * len(shown))
    grid = figure.subplots(len(shown), 1 + len(classes), squeeze=False)
    hollow = False
    for row, facet in zip(grid, shown, strict=True):
        here, curve = _at(found.capacity, facet), _at(found.curve, facet)
        _bars(row[0], here)
        for ax, cls in zip(row[1:], classes, strict=True):
            hollow |= _curves(ax, found, here, curve[curve["class"] == cls], cls)
        row[0].set_title(", ".join(f"{key} = {value}" for key, value in facet.items()), fontsize=9, loc="left")
    labels = dict(zip(*reversed(grid[0][1].get_legend_handles_labels()), strict=True))
    if hollow:
        labels["a class saturated"] = hollow_sign()
    columns = legend_columns(list(labels), figure.get_figwidth(), most=8)
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    seeds = len(found.config.seed_list)
    told = [f"{caption.rstrip('.')}. Vertical lines: capacity."]
    told += [f"Bars: capacity, with 95 % intervals over {seeds} seeds." if seeds > 1 else "One seed: no intervals."]
    if len(facets) > len(shown):
        told.append(f"{len(facets) - len(shown)} of {len(facets)} combinations of swept values are in the table only.")
    add_caption(figure, " ".join(told))
    return figure


def _at(table: pd.DataFrame, facet: dict[str, object]) -> pd.DataFrame:
    for key, value in facet.items():
        table = table[table[key] == value]
    return table


def _bars(ax: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))[::-1]
    colours = [style_of(number)["color"] for number in range(len(rows))]
    rate = rows["rate_rps"].to_numpy(dtype=float)
    ax.barh(places, rate, color=colours, height=0.6)
    if rows["rate_lo_rps"].notna().all():
        around = np.abs(rows[["rate_lo_rps", "rate_hi_rps"]].to_numpy(dtype=float).T - rate)
        ax.errorbar(rate, places, xerr=around, fmt="none", ecolor="0.2", elinewidth=1.2, capsize=3)
    full = rows["saturation_rps"].to_numpy(dtype=float)
    ax.plot(full, places, "|", color="0.2", markersize=16, markeredgewidth=1.5, label="saturation")
    ax.set_yticks(places, rows["policy"].astype(str).tolist(), fontsize=9)
    ax.set_xlim(0, None)
    finish_axes(ax, "capacity (requests/s); bold line: saturation")


def _curves(ax: Axes, found: Capacity, here: pd.DataFrame, curve: pd.DataFrame, cls: str) -> bool:
    """Draw a class; whether some point was saturated."""
    lines = []
    for number, policy in enumerate(found.config.policies):
        rows = curve[curve["policy"] == policy.title].sort_values("rate")
        at, values = rows["rate"].to_numpy(dtype=float), rows["slo_attainment"].to_numpy(dtype=float)
        nothing = np.full(len(rows), np.nan)
        saturated = rows["saturated_any"].to_numpy(dtype=bool)
        style = style_of(number)
        lines.append(draw_line(ax, at, values, (nothing, nothing), saturated, policy.title, style))
        for rate in here.loc[here["policy"] == policy.title, "rate_rps"]:
            ax.axvline(rate, color=style["color"], linewidth=1, alpha=0.7, zorder=1)
    asked = found.config.capacity.attainment
    ax.axhline(asked, color="0.3", linestyle="--", linewidth=1, label=f"asked for: {asked:g}")
    ax.set_ylabel(f"{cls} SLO attainment (good / sent)")
    finish_axes(ax, "rate")
    ax.set_xlim(0, None)
    ax.set_ylim(-0.05, 1.05)
    part_lines(ax, lines)
    return bool(curve["saturated_any"].any())
