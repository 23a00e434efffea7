"""The picture of docs/policies.md: the same small scene under every policy that ships."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from figure_parts.results import caption, load
from qllm.plots.schedule import plot_timeline, timeline_key
from qllm.traces.results import PassSlice

CLASSES = {0: "LS", 1: "BE"}
#: what a panel shows of each policy
SAYS = {
    "fcfs": "LS waits for the running pass, and shares the next with BE",
    "priority": "LS is first where a pass ends: here no sooner than under fcfs",
    "chunked": "every pass decodes all and takes a part of a prompt",
    "layer": "a BE pass stops between layers for each LS prefill; LS waits to decode",
    "qllm": "a BE pass stops inside a layer for each LS prefill",
    "hybrid": "LS prefills stop the pass; then all decode beside large parts of prompts",
    "slack": "LS prefills stop the pass, and so do tokens of LS that are due",
}


def policies(name: str) -> Figure:
    """A panel for each policy: passes above, LS requests from arrival to first token below."""
    found = load(name)
    panels, requests, slices = found["panels"], found["requests"], found["slices"]
    figure = Figure(figsize=(9, 1.6 * len(panels) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for i, (ax, policy, settings) in enumerate(zip(axes, panels["policy"], panels["settings"], strict=True)):
        mine = requests[requests["panel"] == i]
        ls, be = mine[mine["class"] == "ls"], mine[mine["class"] == "be"]
        asked = [(0, at, first) for at, first in zip(ls["arrival"], ls["first_token"], strict=True)]
        shown = _slices(slices[slices["panel"] == i])
        plot_timeline(shown, CLASSES, layers=found["provenance"]["layers"], requests=asked, ax=ax)
        label = f"{policy}, {settings.replace('_', ' ')}" if settings else policy
        ax.set_title(f"{label}: {SAYS[policy]}", fontsize=9, loc="left")
        ax.set_title(
            f"LS ends at {ls['finish'].max():.2f} s, BE at {be['finish'].max():.2f} s", fontsize=8, loc="right"
        )
        for text in ax.texts:  # TTFTs; two of them fit below each other
            text.set_fontsize(6.5)
        ax.set_xlabel("")
    axes[0].set_xlim(0, 1.02 * slices["end"].max())
    axes[-1].set_xlabel("time (s)")
    figure.legend(**timeline_key(CLASSES), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    told = [line for part in (_told(requests), caption(name).replace("`", "")) for line in textwrap.wrap(part, 150)]
    figure.supxlabel("\n".join(told), fontsize=7, color="0.35")
    return figure


def _told(requests: pd.DataFrame) -> str:
    """The scene in words."""
    scene = requests[requests["panel"] == 0].sort_values("arrival")
    rows = zip(*(scene[c] for c in ("class", "prompt_tokens", "output_tokens", "arrival")), strict=True)
    each = (f"{cls.upper()} {prompt:,} + {output} tokens at {at:g} s" for cls, prompt, output, at in rows)
    return f"Prompt + output: {'; '.join(each)}. A pass has the colour of the most urgent class in it."


def _slices(rows: pd.DataFrame) -> list[PassSlice]:
    """Of the picture's columns; what it does not show is left at nothing."""
    nothing = dict.fromkeys(PassSlice._fields, 0)
    return [PassSlice(**{**nothing, **row}) for row in rows.drop(columns="panel").to_dict("records")]
