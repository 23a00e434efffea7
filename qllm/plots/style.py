"""What figures share: colours, axes, lines that coincide, captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from qllm.config.config import RATE

if TYPE_CHECKING:
    from qllm.experiment.results import Results

# Okabe and Ito (2008), told apart by colour-blind readers; markers repeat the difference in black and white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 4)))
SATURATED = "_saturated"  #: label of hollow markers, which no legend shows by itself
_CLOSE = 1.6  #: points between lines that the eye takes for one, and between those drawn side by side
_LABELS = {True: 5, False: 9}  #: how many numbers an x axis and a y axis have room for
_SUBS = ((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), (1.0, 2.0, 5.0), (1.0, 3.0))  #: numbers in each decade


def style_of(policy: int, value: int = 0) -> dict[str, Any]:
    """Colour and marker of the `policy`-th policy, dashes of the `value`-th value of what is swept besides."""
    return {
        "color": COLOURS[policy % len(COLOURS)],
        "marker": _MARKERS[(policy + policy // len(COLOURS)) % len(_MARKERS)],
        "linestyle": _DASHES[value % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no global state, no display, the same bytes for the same data. Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes() -> Axes:
    """Axes of a pyplot figure, as notebooks show them."""
    from matplotlib import pyplot  # only notebooks need pyplot and the window system that it may bring

    axes: Axes = pyplot.subplots(figsize=(5.4, 4.0), layout="constrained")[1]
    return axes


def finish_axes(ax: Axes, x: str) -> None:
    """Name the x axis, draw a light grid, leave the frame out."""
    cls = class_of_rate(x)
    ax.set_xlabel("request rate (requests/s)" if x == RATE else f"{cls} request rate (requests/s)" if cls else x)
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def class_of_rate(key: str) -> str | None:
    """The class whose own rate the key of a configuration is; None for any other key."""
    before, _, name = key.rpartition(".")
    return before.removeprefix("classes.") if before.startswith("classes.") and name == RATE else None


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, with so many numbers in a decade that they do not collide. Its limits must be final."""
    ax, on_x = axis.axes, isinstance(axis, XAxis)
    (ax.set_xscale if on_x else ax.set_yscale)("log")
    low, high = ax.get_xlim() if on_x else ax.get_ylim()
    if high < 3 * low:  # else there may be no number at all
        low, high = np.sqrt(low * high / 3), np.sqrt(low * high * 3)
        (ax.set_xlim if on_x else ax.set_ylim)(low, high)
    decades = np.log10(high / low)
    subs = next((subs for subs in _SUBS if len(subs) * decades <= _LABELS[on_x]), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=_LABELS[on_x]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_line(
    ax: Axes,
    at: np.ndarray,
    values: np.ndarray,
    band: tuple[np.ndarray, np.ndarray],
    saturated: np.ndarray,
    label: str,
    style: dict[str, Any],
    joined: bool = True,
) -> list[Artist]:
    """Draw a line with its band, hollow markers where it is `saturated`; what was drawn, the line first.

    `joined`: or points on their own.
    """
    around: Artist
    if joined:
        around = ax.fill_between(at, *band, color=style["color"], alpha=0.15, linewidth=0)
    else:
        style = {**style, "linestyle": ""}
        around = ax.vlines(at, *band, color=style["color"], alpha=0.5, linewidth=2)
    artists: list[Artist] = [*ax.plot(at, values, label=label, **style), around]
    if saturated.any():
        hollow = {**style, "linestyle": "", "markerfacecolor": "white", "label": SATURATED, "zorder": 2.5}
        artists += ax.plot(at[saturated], values[saturated], **hollow)
    return artists


def hollow_sign() -> Line2D:
    """What a legend shows for hollow markers."""
    return Line2D([], [], marker="o", markerfacecolor="white", markeredgecolor="0.3", linestyle="", markersize=4.5)


def legend_columns(labels: Sequence[str], width: float, most: int) -> int:
    """How many columns a legend of such labels in small type may have, in a figure `width` inches wide."""
    widest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    return max(1, min(most, int(width / (0.075 * widest + 0.65))))


def part_lines(ax: Axes, lines: Sequence[Sequence[Artist]]) -> bool:
    """Draw lines side by side that lie on each other over a stretch; whether there were any.

    `lines`: each a Line2D, and what goes with it; their data stay as they are. The limits of the axes must be final.
    """
    ax.get_xlim(), ax.get_ylim()  # brings the transformation up to date
    points = [_on_paper(ax, line[0]) for line in lines]
    groups: list[list[int]] = []
    for i, mine in enumerate(points):
        joined = [group for group in groups if any(_coincide(mine, points[j]) for j in group)]
        groups = [group for group in groups if group not in joined] + [[*(j for group in joined for j in group), i]]
    for group in groups:
        apart = min(_CLOSE, 7 / max(len(group) - 1, 1))  # many lines stay near their values
        rise = sum(np.nan_to_num(points[i][-1, 1] - points[i][0, 1]) for i in group)
        for place, i in enumerate(sorted(group)):
            aside = apart * (place - (len(group) - 1) / 2) * np.sqrt(0.5)
            to = aside / 72, (aside if rise < 0 else -aside) / 72  # across the lines, whether they rise or fall
            for artist in lines[i]:
                artist.set_transform(ax.transData + ScaledTranslation(*to, ax.figure.dpi_scale_trans))
    return any(len(group) > 1 for group in groups)


def _on_paper(ax: Axes, line: Any) -> np.ndarray:
    """The points of a line in points of the page, float64[n, 2]."""
    data = np.column_stack([np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)])
    return np.asarray(ax.transData.transform(data)) * 72 / ax.figure.dpi


def _coincide(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two lines over the same values of x lie on each other between two of them, or at the only one."""
    if len(one) != len(other) or np.abs(one[:, 0] - other[:, 0]).max(initial=0.0) > _CLOSE:
        return False
    close = np.abs(one[:, 1] - other[:, 1]) < _CLOSE
    return bool((close[1:] & close[:-1]).any() if len(close) > 1 else close.any())


def add_caption(figure: Figure, caption: str | Results) -> None:
    """Write a caption below the panels of a figure.

    Args:
        figure: Any figure.
        caption: The text; or results, of which it says whether they are simulated, and on what.
    """
    text = caption if isinstance(caption, str) else origin(caption.config.provenance["timings"])
    lines = textwrap.fill(text, int(18 * figure.get_figwidth()))  # about 18 letters an inch in this size
    figure.supxlabel(lines, fontsize=7, color="0.35")


def origin(timings: str) -> str:
    """What a figure of results says: `timings` is the provenance of the step times, or names the real engine."""
    return f"Measured. {timings}" if timings.startswith("engine: real") else f"Simulated. Timings: {timings}"
