"""The pictures of the documents, each drawn from one results file."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figure_parts.classes import three_classes_slo
from figure_parts.policies import policies
from figure_parts.results import caption, load
from qllm.plots.lines import lines_of
from qllm.plots.schedule import plot_timeline, timeline_key
from qllm.plots.style import COLOURS, add_caption, draw_line, finish_axes, hollow_sign, log_axis, part_lines
from qllm.traces.results import PassSlice

CLASSES = {0: "LS", 1: "BE"}
GOALS = {"mean": 0.05, "p50": 0.05, "p99": 0.10}
TITLES = {"ttft": "TTFT", "tpot": "TPOT", "turnaround": "turnaround"}


def ttft(name: str) -> Figure:
    """LS TTFT against request rate: mean with its band over the seeds, and p99."""
    return _against_rate(name, "ttft_p99_s", "LS TTFT, p99 (s)", 3.0, "SLO 3 s")


def long_prefill_ttft(name: str) -> Figure:
    """The same for long BE prompts; the tail over what a request takes alone."""
    return _against_rate(name, "ttft_over_isolated_p99", "LS TTFT / isolated TTFT, p99", 5.0, "SLO 5x isolated")


def _against_rate(name: str, tail: str, title: str, slo: float, told: str) -> Figure:
    """Two panels. The SLO's line is drawn where it is of the panel's unit."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    summary = load(name)["summary"]
    ls = summary[summary["class"] == "ls"]
    for ax, column, shown in ((left, "ttft_mean_s", "LS TTFT, mean (s)"), (right, tail, title)):
        lines = []
        for (label, style), line in lines_of(ls, "rate"):
            numbers = line[["rate", column, "ttft_mean_lo_s", "ttft_mean_hi_s"]].to_numpy(dtype=float)
            at, values, low, high = numbers.T
            band = (low, high) if ax is left else (np.full(len(line), np.nan),) * 2
            lines.append(draw_line(ax, at, values, band, line["saturated"].to_numpy(bool), label, style))
        if ax is right or tail == "ttft_p99_s":
            ax.axhline(slo, color="0.3", linestyle="--", linewidth=1, label=told)
        ax.set_ylabel(shown)
        finish_axes(ax, "rate")
        log_axis(ax.yaxis)
        part_lines(ax, lines)
    entries = {label: line for ax in (left, right) for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if ls["saturated"].any():
        entries["saturated"] = hollow_sign()
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    signs = "Bands: 95\u00a0%, bootstrap over the seeds. Lines that coincide are drawn side by side."
    if ls["saturated"].any():
        signs += " Saturated: the queue still grew when arrivals ended, so the value depends on the run's length."
    add_caption(figure, f"{_plain(name)} {signs}")
    return figure


def timeline(name: str) -> Figure:
    """The same few requests under three policies: passes above, LS requests from arrival to first token below."""
    found = load(name)
    layers = found["provenance"]["layers"]
    panels, requests, slices = found["panels"], found["requests"], found["slices"]
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for i, (ax, title) in enumerate(zip(axes, panels["title"], strict=True)):
        ls = requests[(requests["panel"] == i) & (requests["class"] == "ls")]
        asked = [(0, at, first) for at, first in zip(ls["arrival"], ls["first_token"], strict=True)]
        plot_timeline(_slices(slices[slices["panel"] == i]), CLASSES, layers=layers, requests=asked, ax=ax)
        ax.set_title(title, fontsize=10, loc="left")
    axes[0].set_xlim(0, 1.05 * max(ax.get_xlim()[1] for ax in axes))
    for ax in axes[:-1]:
        ax.set_xlabel("")
    figure.legend(**timeline_key(CLASSES), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    be, ls = (requests[(requests["panel"] == 0) & (requests["class"] == cls)] for cls in ("be", "ls"))
    long, short = be["prompt_tokens"], ls["prompt_tokens"]
    told = f"Two BE prompts of {long.iloc[0]:,} tokens arrive at 0 and {be['arrival'].iloc[1]:.1f} s, "
    told += f"three LS prompts of {short.min():,} to {short.max():,} tokens while they run."
    figure.supxlabel(f"{told}\n{textwrap.fill(_plain(name), 150)}", fontsize=7, color="0.35")
    return figure


def _plain(name: str) -> str:
    """The caption of a results file without Markdown."""
    return caption(name).replace("`", "")


def _slices(rows: pd.DataFrame) -> list[PassSlice]:
    """Of the picture's columns; what it does not show is left at nothing."""
    nothing = dict.fromkeys(PassSlice._fields, 0)
    return [PassSlice(**{**nothing, **row}) for row in rows.drop(columns="panel").to_dict("records")]


def validation(name: str) -> Figure:
    """Simulated over real - 1, a dot per statistic. Shaded: the goal of mean and p50; lines: that of p99."""
    errors = load(name)["errors"]
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    places = errors[["policy", "rate"]].drop_duplicates().reset_index(drop=True)
    for ax, metric in zip(figure.subplots(1, 3, sharey=True, sharex=True), TITLES, strict=True):
        _dots(ax, errors[errors["metric"] == metric], places)
        ax.set_title(TITLES[metric], fontsize=10)
        ax.set_xlabel("simulated / real - 1 (%)")
    figure.axes[0].set_yticks(range(len(places)), [f"{policy}, {rate:g}/s" for policy, rate in places.to_numpy()])
    figure.axes[0].invert_yaxis()
    shown = figure.axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    add_caption(figure, _plain(name))
    return figure


def _dots(ax: Axes, errors: pd.DataFrame, places: pd.DataFrame) -> None:
    """One metric: a row of dots for each policy and rate; hollow: at the run's average speed."""
    ax.axvspan(-100 * GOALS["mean"], 100 * GOALS["mean"], color="0.92", label="goal of mean and p50, lines: of p99")
    for side in (-1, 1):
        ax.axvline(side * 100 * GOALS["p99"], color="0.75", linewidth=0.8)
    for colour, (statistic, marker) in zip(COLOURS, {"mean": "o", "p50": "s", "p99": "^"}.items(), strict=False):
        mine = places.merge(errors[errors["statistic"] == statistic], on=["policy", "rate"])
        ax.plot(100 * mine["followed"], mine.index, marker, color=colour, markersize=5, label=statistic)
        ax.plot(100 * mine["average"], mine.index, marker, mfc="none", mec=colour, markersize=4, alpha=0.6)
    ax.spines[["top", "right"]].set_visible(False)


#: file in docs/img -> (results file, how it is drawn)
PICTURES: dict[str, tuple[str, Callable[[str], Figure]]] = {
    "ttft.png": ("paper", ttft),
    "long_prefill_ttft.png": ("long_prefill", long_prefill_ttft),
    "three_classes_slo.png": ("three_classes", three_classes_slo),
    "timeline.png": ("timeline", timeline),
    "policies.png": ("policies", policies),
    "validation_cpu.png": ("validation", validation),
}
