"""The CSV formats: whole columns at once, and row by row only where that fails, to find the line."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
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
from qllm.traces.requests._time_units import Number, bound, row_number, whole
from qllm.traces.requests.trace import TraceError, check_classes
from qllm.traces.session_rows import (
    FOLLOWS,
    FOLLOWS_ALLOWED,
    SESSION_COLUMNS,
    THINK,
    THINK_ALLOWED,
    SessionRows,
    row_problem,
)
from qllm.traces.wants import BOUND, TAGS, TENANT, WANTS, first_odd, is_tenant, tags_of

NOTHING = Columns(np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

_DATE = re.compile(r"((?:19|2[01])\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)

Convert = Callable[[Sequence[str]], np.ndarray | Sequence[Any]]


def read_csv(path: Path, format: str, skipped: SkippedRows) -> Columns:
    """The columns of one CSV trace; TraceError names the file and the line."""
    header, places, rows, classes = _table(path, skipped)
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
    said = [name for name in SESSION_COLUMNS if own and name in header]
    names = (*wanted, *wants, *said)
    cells = [header.index(name) for name in names]
    times: Convert = _dates if format == "azure" else _numbers
    converts = (times, _counts, _counts, *(_WANTS[name] for name in (*wants, *said)))

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
        sessions = _sessions(places, dict(zip(names, columns, strict=True))) if said else None
    except (ValueError, OverflowError):
        good = []
        for place, row in zip(places, rows, strict=True):
            reason = _problem(row, names, cells, converts) or (None if at is None else problems[row[at]])
            if said and not reason:
                try:
                    _sessions([place], dict(zip(names, convert([row]), strict=True)))
                except ValueError as error:
                    reason = str(error)
            if reason:
                skipped.row(f"line {place[1]}", reason)
            else:
                good.append((place, row))
        if not good:
            return NOTHING
        places, rows = map(list, zip(*good, strict=True))
        columns = convert(rows)
        sessions = _sessions(places, dict(zip(names, columns, strict=True))) if said else None
    arrival, prompt, output, *more = columns
    classed = None if at is None else [row[at] for row in rows]
    found = dict(zip(wants, more, strict=False))
    return Columns(arrival, prompt, output, classed, classes, wants=found, sessions=sessions)


def _sessions(places: Sequence[tuple[int, int]], columns: Mapping[str, Any]) -> SessionRows:
    """Who follows whom. ValueError for the first row that cannot follow the one it names."""
    nothing = [None] * len(places)
    found = SessionRows()
    told = zip(places, columns.get(FOLLOWS, nothing), columns.get(THINK, nothing), strict=True)
    for (row, line), follows, think_s in told:
        problem = row_problem(row, follows, think_s)
        if problem:
            raise ValueError(problem)
        found.add(row, follows, think_s or 0.0, line)
    return found


def _table(
    path: Path, skipped: SkippedRows
) -> tuple[list[str], list[tuple[int, int]], list[list[str]], tuple[str, ...] | None]:
    """Header; number (from 0 on), line and cells of each row; classes that a comment (before the header) declares."""
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
    places: list[tuple[int, int]] = []
    rows: list[list[str]] = []
    broken = 0
    try:
        for row in reader:
            if len(row) == len(header) != 0:
                places.append((len(rows) + broken, comments + reader.line_num))
                rows.append(row)
            elif row and not header:
                header = [name.strip() for name in row]
            elif row:
                broken += 1
                where = f"line {comments + reader.line_num}"
                skipped.row(where, f"has {len(row)} cells, must have {len(header)} as the header has")
    except csv.Error as error:
        raise TraceError(f"{path}, line {comments + reader.line_num}: {error}") from None
    return header, places, rows, classes


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


def _rows_before(cells: Sequence[str]) -> list[int | None]:
    """Numbers of rows; None where a cell is empty: none."""
    found = [row_number(_decimal(cell)) if cell else None for cell in cells]
    if any(number is None and cell for number, cell in zip(found, cells, strict=True)):
        raise ValueError
    return found


def _think_times(cells: Sequence[str]) -> list[float | None]:
    """Seconds; None where a cell is empty."""
    return [float(_numbers([cell])[0]) if cell else None for cell in cells]


_WANTS: dict[str, Convert] = {"max_ttft_s": _bounds, "max_tpot_s": _bounds, "tenant": _tenants, "tags": _tags}
_WANTS |= {FOLLOWS: _rows_before, THINK: _think_times}

_ALLOWED: dict[Convert, str] = {
    _bounds: f"{BOUND}, or empty",
    _tenants: f"{TENANT}, or empty",
    _tags: f"pairs as lane=batch;region=eu, or empty: {TAGS}",
    _rows_before: f"{FOLLOWS_ALLOWED}, or empty",
    _think_times: f"{THINK_ALLOWED}, or empty",
    _counts: "an integer >= 1",
    _numbers: "a number >= 0 (seconds)",
    _dates: "a date in UTC as 2023-11-16 18:15:46.6805900",
}
