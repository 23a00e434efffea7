"""A picture of the load over time: how busy the GPUs are, how full their passes, how much KV is in use, who waits."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from qllm.experiment.load import FRONT
from qllm.plots.style import add_caption, legend_columns, new_figure, style_of

#: Columns of the table, a panel each, and how its axis names them.
PANELS = {
    "utilisation": "GPU busy",
    "sequences": "sequences\nin the pass",
    "kv_used": "KV blocks\nin use",
    "waiting": "requests waiting\nfor prefill",
}
_SHARES = ("utilisation", "kv_used")
_POINTS = 300  #: of all lines of a panel together: more would hide each other


def save_load(table: pd.DataFrame, path: str | Path, caption: str, policies: Sequence[str], urgent: str = "") -> bool:
    """Write a picture of a `load_table` whose runs are at one point of a sweep: panels over time, a line per policy.

    Of several GPUs the line is the mean and the band goes from the lowest to the highest; waiting requests are
    those of all GPUs and in front of them together.

    Args:
        table: What `load_table` gave.
        path: A PNG file.
        caption: Simulated or measured, and on what.
        policies: In the order of their colours.
        urgent: A class whose waiting requests have lines of their own; default: none has.

    Returns:
        False, and nothing is written, where the table has no rows.
    """
    if table.empty:
        return False
    figure = new_figure(8, 7.6)
    panels = dict(zip(PANELS, figure.subplots(len(PANELS), 1, sharex=True), strict=True))
    table = _coarser(table, max(40, _POINTS // table["policy"].nunique()))
    lines = list(table.groupby("policy", sort=False))
    key: dict[str, Line2D] = {}
    for number, (policy, rows) in enumerate(lines, start=1):
        # later lines are thinner, so that one that lies on another leaves both visible
        width = 1.0 + 1.2 * (len(lines) - number) / max(len(lines) - 1, 1)
        style = {"color": style_of(policies.index(str(policy)))["color"], "linewidth": width}
        key[str(policy)] = Line2D([], [], **style)
        for column, ax in panels.items():
            _draw(ax, rows, column, style)
        if urgent:
            _draw(panels["waiting"], rows, f"waiting.{urgent}", {**style, "linestyle": (0, (2, 1))})
    for column, ax in panels.items():
        _finish(ax, column)
    figure.align_ylabels()
    bottom = panels["waiting"]
    bottom.set_xlabel("time (s)")
    bottom.set_xlim(0, table["end_s"].max())
    columns = legend_columns(list(key), 8, most=6)
    figure.legend(key.values(), key.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    add_caption(figure, " ".join([_told(table, urgent), caption]))
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _coarser(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """The means of `table` over so many windows each that no run has more than `most`.

    All runs have windows of one length, so that those of the same number begin at the same time.
    """
    number = table.groupby(["policy", "replica"], sort=False).cumcount()
    together = ceil((number.max() + 1) / most)
    names = [str(name) for name in table.columns]
    split = names.index("end_s") + 1
    labels, values = names[:split], [name for name in names[split:] if not name.endswith("_max")]
    seconds = table["end_s"] - table["start_s"]
    weighted = table[labels].join(table[values].mul(seconds, axis=0)).assign(seconds=seconds)
    how = dict.fromkeys(labels, "first") | {"end_s": "last"} | dict.fromkeys([*values, "seconds"], "sum")
    merged = weighted.groupby([table["policy"], table["replica"], number // together], sort=False).agg(how)
    return merged[labels].join(merged[values].div(merged["seconds"], axis=0)).reset_index(drop=True)


def _draw(ax: Axes, rows: pd.DataFrame, column: str, style: dict[str, Any]) -> None:
    """One line through the middles of the windows."""
    gpus = rows.groupby("start_s", sort=True)
    at = gpus[["start_s", "end_s"]].first().mean(axis=1).to_numpy()
    if column.startswith("waiting"):
        front = column.replace("waiting", FRONT)
        values = gpus[column].sum() + (gpus[front].first() if front in rows else 0.0)
    else:
        values = gpus[column].mean()
        if rows["replica"].nunique() > 1:
            band = gpus[column].min(), gpus[column].max()
            ax.fill_between(at, *band, color=style["color"], alpha=0.15, linewidth=0)
    ax.plot(at, values, **style)


def _finish(ax: Axes, column: str) -> None:
    ax.set_ylabel(PANELS[column])
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if column in _SHARES:
        ax.set_ylim(-0.03, 1.05)
        ax.set_yticks([0, 0.5, 1])
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        top = ax.dataLim.y1
        ax.set_ylim(-0.03 * (top or 1), 1.06 * (top or 1))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=top > 3))


def _told(table: pd.DataFrame, urgent: str) -> str:
    """What the signs mean, and where in the sweep it is."""
    window = (table["end_s"] - table["start_s"]).max()
    names = list(table.columns)
    at = ", ".join(f"{key}={table[key].iloc[0]}" for key in names[1 : names.index("replica")])
    said = [f"Means over {window:.3g} s each, in which idle time counts as 0; {at}."]
    gpus = table["replica"].nunique()
    if gpus > 1:
        said.append(f"Mean of {gpus} GPUs, band: lowest to highest; waiting requests: of all together.")
    if urgent:
        said.append(f"Dashed: {urgent} alone.")
    return " ".join(said)
