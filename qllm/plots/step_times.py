"""Figures of a timing trace: what one expert takes, and how unevenly tokens are spread over the experts."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from qllm.plots.style import COLOURS, new_axes
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape
from qllm.traces.step_times.timings import Timings

_MARKERS = {"measured": "o", "imported": "s", "modelled": "x"}


def plot_expert_times(timings: Timings, ax: Axes | None = None) -> Axes:
    """Draw f(m): microseconds that one expert with m tokens adds to its layer, on the axes returned.

    Shown are the points of the trace by source, with their spread where known, and the curve that simulations use. Both
    axes are logarithmic.

    Args:
        timings: The timing trace.
        ax: Where to draw; default: axes of a new figure.
    """
    ax = ax or new_axes()
    points = sorted((p for p in timings.points if p.step == "expert"), key=lambda p: p.tokens)
    m = np.unique(np.geomspace(1, points[-1].tokens, 400).astype(int))
    ax.plot(m, 1e6 * timings.expert(m), color=COLOURS[0], linewidth=1.3, label="curve used by simulations")
    for source, marker in _MARKERS.items():
        mine = [p for p in points if p.source == source]
        if not mine:
            continue
        spread = [1e6 * (p.spread_s or 0.0) for p in mine]
        at = ([p.tokens for p in mine], [1e6 * p.seconds for p in mine])
        ax.errorbar(*at, yerr=spread, fmt=marker, markersize=4, color=COLOURS[4], linewidth=1, label=f"{source} points")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("tokens of one expert")
    ax.set_ylabel("time that it adds to its layer (us)")
    _frame(ax)
    return ax


def roofline(tokens: np.ndarray, shape: ModelShape, weights: str, flops: float, bandwidth: float) -> np.ndarray:
    """Seconds that one expert takes at least, float64[n] (Williams, Waterman and Patterson, 2009).

    The longer of its arithmetic (2 operations a weight and token, at `flops` per second) and of moving its weights (of
    type `weights` of WEIGHT_BYTES) and activations (at `bandwidth` bytes per second).
    """
    arithmetic = 2.0 * shape.expert_weights * tokens / flops
    activations = 2.0 * tokens * (2 * shape.hidden + 3 * shape.inter)  # 16 bits each; in, out, gate, up, product
    return np.maximum(arithmetic, (shape.expert_weights * WEIGHT_BYTES[weights] + activations) / bandwidth)


def plot_popularity(shares: np.ndarray, layers: list[int], ax: Axes | None = None) -> Axes:
    """Draw how unevenly tokens are spread over the experts of a layer, sorted by share; 1 on the y axis is even.

    Args:
        shares: Share of the tokens that go to each expert, float[layers, experts].
        layers: The layers to draw, a line each.
        ax: Where to draw; default: axes of a new figure.
    """
    ax = ax or new_axes()
    experts = shares.shape[1]
    for position, layer in enumerate(layers):
        ordered = np.sort(shares[layer])[::-1] * experts
        ax.plot(np.arange(1, experts + 1), ordered, color=COLOURS[position], label=f"layer {layer}", linewidth=1.5)
    ax.axhline(1.0, color="0.4", linestyle="--", linewidth=1, label="even")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("expert, most popular first")
    ax.set_ylabel("share of tokens / even share")
    _frame(ax)
    return ax


def _frame(ax: Axes) -> None:
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
