"""The CSV formats: whole columns at once, and row by row only where that fails, to find the line."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.messages import clipped
from qllm.traces.requests._columns import (
    CLASS_COLUMN,
    CLASSES_HEADER,
    CSV_COLUMNS,
    OPTIONAL,
    OWN_COLUMNS,
    Columns,
    SkippedRows,
    class_problem,
    text_lines,
)
from qllm.traces.requests._time_units import Number, bound, whole
from qllm.traces.requests.trace import TraceError, check_classes
from qllm.traces.wants import BOUND, TAGS, TENANT, WANTS, first_odd, is_tenant, tags_of

NOTHING = Columns(np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

_DATE = re.compile(r"((?:19|2[01])\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)

Convert = Callable[[Sequence[str]], np.ndarray | Sequence[Any]]


def read_csv(path: Path, format: str, skipped: SkippedRows) -> Columns:
    """The columns of one CSV trace; TraceError names the file and the line."""
    header, numbers, rows, classes = _table(path, skipped)
    wanted = CSV_COLUMNS[format]
    for name in wanted:
        if header.count(name) != 1:
            problem = "stands twice" if name in header else "is missing"
            raise TraceError(f"{path}: column {name!r} {problem}; format {format} has {', '.join(wanted)}")
    own = format == "csv"
    if own:
        allowed = (*OWN_COLUMNS, *OPTIONAL)
        for name in header:
            if name not in allowed:
                raise TraceError(f"{path}: unknown column {name!r}; allowed: {', '.join(allowed)}")
            if header.count(name) > 1:
                raise TraceError(f"{path}: column {name!r} stands twice; allowed: once each {', '.join(allowed)}")
    wants = [name for name in WANTS if own and name in header]
    names = (*wanted, *wants)
    cells = [header.index(name) for name in names]
    times: Convert = _dates if format == "azure" else _numbers
    converts = (times, _counts, _counts, *(_WANTS[name] for name in wants))

    def convert(part: list[list[str]]) -> list[Any]:
        columns = list(zip(*part, strict=True))
        return [one(columns[i]) for one, i in zip(converts, cells, strict=True)]

    if not rows:
        return NOTHING
    at = header.index(CLASS_COLUMN) if own and CLASS_COLUMN in header else None
    problems = {} if at is None else {name: class_problem(name, classes) for name in {row[at] for row in rows}}
    try:
        if any(problems.values()):
            raise ValueError
        columns = convert(rows)
    except (ValueError, OverflowError):
        good = []
        for number, row in zip(numbers, rows, strict=True):
            reason = _problem(row, names, cells, converts) or (None if at is None else problems[row[at]])
            if reason:
                skipped.row(f"line {number}", reason)
            else:
                good.append(row)
        rows = good
        if not rows:
            return NOTHING
        columns = convert(rows)
    arrival, prompt, output, *more = columns
    classed = None if at is None else [row[at] for row in rows]
    found = dict(zip(wants, more, strict=True))
    return Columns(arrival, prompt, output, classed, classes, wants=found)


def _table(path: Path, skipped: SkippedRows) -> tuple[list[str], list[int], list[list[str]], tuple[str, ...] | None]:
    """Header; line number and cells of each row; classes that a comment ('#' lines before the header) declares."""
    lines = text_lines(path)
    classes = None
    header: list[str] = []
    comments = 0
    for line in lines:
        if not line.startswith("#"):
            lines = itertools.chain([line], lines)
            break
        comments += 1
        if line.startswith(f"# {CLASSES_HEADER}:"):
            try:
                classes = check_classes(json.loads(line.split(":", 1)[1]))
            except ValueError as error:
                raise TraceError(f"{path}, line {comments}: {CLASSES_HEADER} must be a JSON list: {error}") from None
    reader = csv.reader(lines)
    numbers: list[int] = []
    rows: list[list[str]] = []
    try:
        for row in reader:
            if len(row) == len(header) != 0:
                numbers.append(comments + reader.line_num)
                rows.append(row)
            elif row and not header:
                header = [name.strip() for name in row]
            elif row:
                where = f"line {comments + reader.line_num}"
                skipped.row(where, f"has {len(row)} cells, must have {len(header)} as the header has")
    except csv.Error as error:
        raise TraceError(f"{path}, line {comments + reader.line_num}: {error}") from None
    return header, numbers, rows, classes


def _problem(row: list[str], wanted: Sequence[str], cells: Sequence[int], converts: Sequence[Convert]) -> str | None:
    for name, i, convert in zip(wanted, cells, converts, strict=True):
        try:
            convert([row[i]])
        except (ValueError, OverflowError):
            return f"{name} is {clipped(row[i])!r}, must be {_ALLOWED[convert]}"
    return None


def _counts(cells: Sequence[str]) -> np.ndarray:
    try:
        values = np.fromiter(map(int, cells), np.int64, len(cells))
    except ValueError:
        values = np.array([whole(_decimal(cell)) or 0 for cell in cells])
    if values.min() < 1:
        raise ValueError
    return values


def _numbers(cells: Sequence[str]) -> Sequence[Number]:
    values: Sequence[Number]
    try:
        values = list(map(int, cells))
    except ValueError:
        values = list(map(_decimal, cells))
    rounded = np.fromiter(map(float, values), np.float64, len(values))
    if not (np.isfinite(rounded).all() and rounded.min() >= 0):
        raise ValueError
    return values


def _decimal(cell: str) -> Decimal:
    try:
        return Decimal(cell)
    except InvalidOperation:
        raise ValueError from None


def _dates(cells: Sequence[str]) -> np.ndarray:
    """Seconds since the first date; whole nanoseconds until then. The 2024 traces write +00:00 behind each date."""
    found = [_DATE.fullmatch(cell.strip()) for cell in cells]
    dates = np.array([one[1] for one in found if one], dtype="datetime64[ns]")
    if len(dates) < len(cells):
        raise ValueError
    seconds: np.ndarray = (dates - dates.min()).astype(np.int64) / 1e9
    return seconds


def _bounds(cells: Sequence[str]) -> np.ndarray:
    """Seconds; inf where a cell is empty: no bound."""
    return np.array([math.inf if not cell else bound(_decimal(cell)) for cell in cells], dtype=np.float64)


def _tenants(cells: Sequence[str]) -> Sequence[str]:
    if first_odd(cells, is_tenant) is not None:
        raise ValueError
    return cells


def _tags(cells: Sequence[str]) -> list[dict[str, str]]:
    known = {cell: tags_of(cell) for cell in set(cells)}
    return [known[cell] for cell in cells]


_WANTS: dict[str, Convert] = {"max_ttft_s": _bounds, "max_tpot_s": _bounds, "tenant": _tenants, "tags": _tags}

_ALLOWED: dict[Convert, str] = {
    _bounds: f"{BOUND}, or empty",
    _tenants: f"{TENANT}, or empty",
    _tags: f"pairs as lane=batch;region=eu, or empty: {TAGS}",
    _counts: "an integer >= 1",
    _numbers: "a number >= 0 (seconds)",
    _dates: "a date in UTC as 2023-11-16 18:15:46.6805900",
}
