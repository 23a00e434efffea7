"""What stands on the x axis of a sweep's figures, and which lines there are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qllm.config.config import RATE
from qllm.experiment.results import Results
from qllm.plots.notes import told
from qllm.plots.style import class_of_rate, style_of

_WIDE = 0.75  #: of a place on an axis without numbers: its lines stand beside each other
_LETTERS = 48  #: that such an axis has room for


def most_urgent(results: Results) -> str:
    """The class with the lowest priority number (the first of equals)."""
    classes = results.config.classes
    return min(classes, key=lambda name: classes[name].priority)


def titles(results: Results) -> list[str]:
    """The policies, in the order of their colours."""
    return [policy.title for policy in results.config.policies]


def x_axis(results: Results) -> str:
    """The swept key on the x axis: the rate; if only others were swept, the first with numbers, else the first."""
    several = _varied(results)
    numeric = [key for key in several if pd.api.types.is_numeric_dtype(results.summary[key])]
    return next(iter([*numeric, *several]), RATE)


def other_keys(results: Results) -> list[str]:
    """The other swept keys with more than one value."""
    x = x_axis(results)
    return [key for key in _varied(results) if key != x]


def _varied(results: Results) -> list[str]:
    """The rate and the swept keys that have more than one value.

    Where the rate of a class was swept, that of all together only follows it, and is left out.
    """
    swept = dict.fromkeys([RATE, *results.config.sweep])
    if RATE not in results.config.sweep and any(class_of_rate(key) for key in results.config.sweep):
        del swept[RATE]
    return [key for key in swept if results.summary[key].nunique() > 1]


def spread_out(results: Results, x: str) -> bool:
    """Whether the x axis has several numbers, which lines join; else it has a place for each text or policy."""
    return results.summary[x].nunique() > 1 and pd.api.types.is_numeric_dtype(results.summary[x])


def places_of(results: Results, x: str, values: pd.Series, number: int, lines: int) -> np.ndarray:
    """Where the points of the `number`-th line of so many stand on the x axis."""
    if spread_out(results, x):
        return values.to_numpy(dtype=float)
    places = {value: place for place, value in enumerate(results.summary[x].unique())}
    return np.array([places[value] for value in values]) + _WIDE * ((number + 0.5) / lines - 0.5)


def name_places(results: Results, x: str, labels: list[str], ax: Axes) -> None:
    """Name the places of an x axis without numbers."""
    if spread_out(results, x):
        return
    values = results.summary[x].unique()
    names, places = (
        [told(results, x, value).removeprefix(f"{x} = ") for value in values],
        np.arange(len(values), dtype=float),
    )
    if len(values) == 1:
        names, places = labels, _WIDE * ((np.arange(len(labels)) + 0.5) / len(labels) - 0.5)
        ax.set_xlabel(in_words(x, values[0]))
    room = _LETTERS // len(names)
    names = [textwrap.fill(name, max(room, 8)) for name in names]
    long = max(len(line) for name in names for line in name.split("\n")) > room
    ax.set_xticks(places, names, rotation=25 if long else 0, ha="right" if long else "center", fontsize=8)
    ax.set_xlim(-0.5, len(values) - 0.5)


def in_words(x: str, value: Any) -> str:
    """A swept value for a label."""
    if x == RATE and not value > 0:
        return "all requests at once"
    shown = f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
    cls = class_of_rate(x)
    return f"{shown} {f'{cls} ' if cls else ''}requests/s" if x == RATE or cls else f"{x} = {shown}"


def lines_of(
    rows: pd.DataFrame, x: str, keys: Sequence[str] = (), policies: Sequence[str] = ()
) -> Iterator[tuple[tuple[str, dict[str, Any]], pd.DataFrame]]:
    """((label, style), rows in the order of `x`) per policy and per combination of the swept `keys`.

    A policy has the colour of its place in `policies` (default: as they come), a combination its dashes.
    """
    order = list(dict.fromkeys([*policies, *map(str, rows["policy"].unique())]))
    combinations: dict[tuple[Any, ...], int] = {}
    for key, group in rows.groupby(["policy", *keys], sort=False, observed=True):
        policy, *values = key if isinstance(key, tuple) else (key,)
        label = ", ".join([str(policy), *(f"{name}={value}" for name, value in zip(keys, values, strict=True))])
        number = combinations.setdefault(tuple(values), len(combinations))
        ordered = group.sort_values(x, kind="stable") if pd.api.types.is_numeric_dtype(group[x]) else group
        yield (label, style_of(order.index(str(policy)), number)), ordered
