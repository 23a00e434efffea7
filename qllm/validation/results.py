"""Files, tables and the figure of a validation."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from qllm.validation.attribution import by_pass
from qllm.validation.validate import METRICS, REAL, SIMULATED, Comparison, errors

TITLES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "turnaround_s": "turnaround"}


def save(compared: list[Comparison], folder: Path) -> None:
    """Write requests.csv, errors.csv, passes.csv and validation.png to `folder`."""
    requests = pd.concat([one.requests() for one in compared], ignore_index=True)
    requests.to_csv(folder / "requests.csv", index=False)
    errors(requests).to_csv(folder / "errors.csv", index=False)
    by_pass(compared).to_csv(folder / "passes.csv", index=False)
    figure(requests, compared[0].real.steps.timings.source).savefig(folder / "validation.png", dpi=150)


def report(folder: Path) -> str:
    """What `save` wrote, as text: errors over all classes and per class, and the largest contributions to them."""
    table = pd.read_csv(folder / "errors.csv")
    table["what"] = table["metric"].str.removesuffix("_s") + " " + table["statistic"]
    names = table["what"].unique().tolist()
    formats = {name: "{:+.0f}".format if name.startswith("preemptions") else "{:+.1%}".format for name in names}
    rows = ["policy", "rate", "class"]
    order = pd.MultiIndex.from_frame(table[rows].drop_duplicates())  # classes as they come, not by the alphabet
    shown = table.pivot(index=rows, columns="what", values="error")[names].reindex(order)
    passes = pd.read_csv(folder / "passes.csv")
    parts = [
        "simulated / real - 1 (preemptions: difference)\n",
        shown.to_string(formatters=formats, na_rep="-") + "\n",
        "largest contributions by kind of pass (share: of the measured time)",
        passes.to_string(index=False, float_format="{:.4f}".format, formatters={"share": "{:+.2%}".format}) + "\n",
    ]
    return "\n".join(parts)


def figure(requests: pd.DataFrame, source: str) -> Figure:
    """Distributions of TTFT, TPOT and turnaround in both worlds, a row per policy, a colour per rate."""
    policies = list(dict.fromkeys(requests["policy"]))
    drawn = Figure(figsize=(11, 2.6 * len(policies) + 0.6), layout="constrained")
    axes = drawn.subplots(len(policies), len(METRICS), squeeze=False)
    rates = list(dict.fromkeys(requests["rate"]))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(rates)))
    for row, policy in zip(axes, policies, strict=True):
        for ax, metric in zip(row, METRICS, strict=True):
            for rate, colour in zip(rates, colours, strict=True):
                mine = requests[(requests["policy"] == policy) & (requests["rate"] == rate)]
                for world, style in ((REAL, "-"), (SIMULATED, "--")):
                    values = np.sort(mine.loc[mine["world"] == world, metric].dropna().to_numpy())
                    share = np.arange(1, len(values) + 1) / max(len(values), 1)
                    ax.step(values, share, style, where="post", color=colour, label=f"{rate:.3g}/s {world}", lw=1.2)
            ax.set(title=f"{policy}: {TITLES[metric]}", xlabel="seconds", ylabel="share of requests", ylim=(0, 1))
            if len(values) and values.min() > 0:
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].legend(fontsize=7)
    drawn.suptitle(f"Real engine (solid) and simulation (dashed, {source} timings)", fontsize=10)
    return drawn
