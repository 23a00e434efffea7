"""Table and picture of three classes, each with an SLO of its own."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figure_parts.markdown import markdown
from figure_parts.results import caption, load
from qllm.plots.lines import lines_of
from qllm.plots.style import add_caption, draw_line, finish_axes, hollow_sign, log_axis, part_lines

RATES = (2, 3)  #: of the table
AGENT_TTFT_S = 2.0
SLOS = {"chat": "TTFT at most 0.3 s and TPOT at most 0.05 s", "agent": f"TTFT at most {AGENT_TTFT_S:g} s"}
PANELS = (
    ("chat", "slo_attainment", "chat SLO attainment (both bounds)"),
    ("agent", "ttft_p99_s", "agent TTFT, p99 (s)"),
    ("batch", "turnaround_mean_s", "batch turnaround, mean (s)"),
)


def three_classes() -> str:
    """SLO attainment class by class and bound by bound, and what the batch pays."""
    found = load("three_classes")
    totals = found["totals"].set_index(["rate", "policy"])
    of = {name: rows.set_index(["rate", "policy"]) for name, rows in found["summary"].groupby("class")}
    rows = []
    for at in (at for at in totals.index if at[0] in RATES):
        chat, agent, batch, everybody = of["chat"].loc[at], of["agent"].loc[at], of["batch"].loc[at], totals.loc[at]
        bounds = f"{chat['slo_ttft_met']:.0%} / {chat['slo_tpot_met']:.0%} / {chat['slo_attainment']:.0%}"
        cells = [bounds, f"{agent['slo_attainment']:.0%}", f"{agent['ttft_p99_s']:.2f}"]
        cells += [_seconds(batch), f"{everybody['slo_attainment']:.0%}", f"{everybody['throughput_rps']:.2f}"]
        rows.append((f"{at[0]:g}", f"`{at[1]}`", *cells))
    columns = ("requests/s", "policy", "chat: TTFT / TPOT / both met", "agent: met", "agent TTFT p99 (s)")
    columns += ("batch turnaround (s)", "SLO met, of all that have one", "done/s")
    return markdown(columns, rows, caption("three_classes"))


def _seconds(batch: pd.Series) -> str:
    return f"{batch['turnaround_mean_s']:.1f}" + (", saturated" if batch["saturated"] else "")


def three_classes_slo(name: str) -> Figure:
    """A panel per class: SLO attainment of chat, TTFT of agents beside their bound, turnaround of the batch."""
    figure = Figure(figsize=(10.8, 3.9), layout="constrained")
    summary = load(name)["summary"]
    drawn = []
    for ax, (cls, column, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        lines = []
        for (label, style), line in lines_of(summary[summary["class"] == cls], "rate"):
            at, values = line[["rate", column]].to_numpy(dtype=float).T
            band = (np.full(len(line), np.nan),) * 2
            lines.append(draw_line(ax, at, values, band, line["saturated"].to_numpy(bool), label, style))
        ax.set_ylabel(title)
        finish_axes(ax, "rate")
        if column == "slo_attainment":
            ax.set_ylim(-0.05, 1.05)
        else:
            if cls == "agent":
                ax.axhline(AGENT_TTFT_S, color="0.3", linestyle="--", linewidth=1, label="SLO of the class")
            log_axis(ax.yaxis)
        drawn.append((ax, lines))
    for ax, lines in drawn:
        part_lines(ax, lines)
    entries = dict(zip(*drawn[1][0].get_legend_handles_labels()[::-1], strict=True))
    entries["saturated"] = hollow_sign()
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    told = " ".join(f"SLO of {cls}: {bounds}." for cls, bounds in SLOS.items())
    signs = "Lines that coincide are drawn side by side. Hollow: the queue still grew when arrivals ended."
    plain = caption(name).replace("`", "")
    add_caption(figure, f"{plain} {told} {signs}")
    return figure
