"""The mean of several timing traces of one model on one device, where a single calibration scatters too widely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from statistics import fmean
from typing import Any

from qllm.traces.step_times.file_format import Point, TimingHeader
from qllm.traces.step_times.timings import SIZELESS, TimingError, Timings

#: header keys that are measured; the others must agree, but for those that tell one calibration from another
_MEASURED = (*SIZELESS, "host_bandwidth", "query_block_s")
_OF_ONE = ("name", "date", "provenance", "licence", "repeats", "conditions", "modelled", "memory_bytes")


def mean_of(traces: Sequence[Timings]) -> Timings:
    """Each time the mean of those in `traces`, all with the same weight; spread_s too, while repeats add up.

    TimingError where there is none, or where they are of another model, device or software, or of other points.
    """
    if not traces:
        raise TimingError("the mean of no timing trace")
    first = traces[0]
    for other in traces[1:]:
        _check_alike(first, other)
    if len(traces) == 1:
        return first
    points = [_mean_point(same) for same in zip(*(trace.points for trace in traces), strict=True)]
    measured: dict[str, Any] = {}
    for key in _MEASURED:
        values = [getattr(trace, key) for trace in traces]
        measured[key] = None if None in values else fmean(values)
    return replace(
        first,
        points=tuple(points),
        name=f"{first.name}, mean of {len(traces)}",
        date=max(trace.date for trace in traces),
        provenance=f"mean of {len(traces)} timing traces; the first: {first.provenance}",
        repeats=_sum(trace.repeats for trace in traces),
        conditions=_conditions([trace.conditions for trace in traces]),
        **measured,
    )


def _check_alike(first: Timings, other: Timings) -> None:
    for field in fields(TimingHeader):
        mine, theirs = getattr(first, field.name), getattr(other, field.name)
        if field.name not in (*_MEASURED, *_OF_ONE) and mine != theirs:
            raise TimingError(
                f"timings {other.name!r}: {field.name} is {theirs!r}, and {mine!r} in {first.name!r}; a mean is of "
                "one model on one device"
            )
    if (first.query_block_s is None) != (other.query_block_s is None):
        raise TimingError(f"timings {other.name!r}: query_block_s stands in only one of it and {first.name!r}")
    for row, (mine, theirs) in enumerate(zip_longest(map(_place, first.points), map(_place, other.points)), start=1):
        if mine != theirs:
            raise TimingError(
                f"timings {other.name!r}, row {row}: holds {theirs or 'nothing'}, and {first.name!r} "
                f"{mine or 'nothing'}; a mean is of calibrations to the same extent"
            )


def _place(p: Point) -> str:
    """What a point is of."""
    return f"{p.step} at tokens {p.tokens}{'' if p.context is None else f', context {p.context}'} ({p.source})"


def _mean_point(same: Sequence[Point]) -> Point:
    spreads = [p.spread_s for p in same if p.spread_s is not None]
    return same[0]._replace(
        seconds=fmean(p.seconds for p in same),
        spread_s=fmean(spreads) if len(spreads) == len(same) else None,
        repeats=_sum(p.repeats for p in same),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _conditions(all_: list[dict[str, Any]]) -> dict[str, Any]:
    """What all say alike, and the means of numbers."""
    found: dict[str, Any] = {}
    for key, value in all_[0].items():
        values = [conditions.get(key) for conditions in all_]
        numbers = [other for other in values if isinstance(other, int | float)]
        if all(other == value for other in values):
            found[key] = value
        elif len(numbers) == len(values):
            found[key] = round(fmean(numbers), 9)
    return found
