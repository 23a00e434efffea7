"""Quantile tables: what share of the requests has at most so many prompt, and output, tokens."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

import numpy as np

from qllm.traces.files import file_stamp
from qllm.traces.requests._columns import text_lines
from qllm.traces.requests.trace import TraceError

BUNDLED = Path(__file__).parents[1] / "data" / "lengths"
TABLE_COLUMNS = ("quantile", "prompt_tokens", "output_tokens")


def bundled_lengths() -> list[str]:
    """Names of the quantile tables that ship with the project."""
    return sorted(path.stem for path in BUNDLED.glob("*.csv"))


def load_table(name_or_path: str) -> dict[str, np.ndarray]:
    """The columns of a bundled table or of a CSV file, float64 each. TraceError names file and line."""
    path = BUNDLED / f"{name_or_path}.csv" if name_or_path in bundled_lengths() else Path(name_or_path)
    return _read_table(path, file_stamp(path))


# A sweep draws from one table many times over; a changed file has another stamp.
@lru_cache(maxsize=8)
def _read_table(path: Path, _: object) -> dict[str, np.ndarray]:
    """A CSV of TABLE_COLUMNS: quantiles from 0 to 1, increasing, and tokens >= 1 that do not decrease."""
    rows: list[list[float]] = []
    header = None
    for number, line in enumerate(text_lines(path), start=1):
        if line.startswith("#") or not line.strip():
            continue
        cells = next(csv.reader([line]))
        if header is None:
            header = cells
            if tuple(header) != TABLE_COLUMNS:
                raise TraceError(f"{path}, line {number}: the columns must be {', '.join(TABLE_COLUMNS)}")
            continue
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            row = []
        if len(row) != 3 or not (0 <= row[0] <= 1 and all(1 <= tokens < 2**53 for tokens in row[1:])):
            raise TraceError(f"{path}, line {number}: {line.strip()!r} must be a quantile from 0 to 1 and tokens >= 1")
        if rows and not (row[0] > rows[-1][0] and row[1] >= rows[-1][1] and row[2] >= rows[-1][2]):
            raise TraceError(f"{path}, line {number}: quantiles must increase and tokens must not decrease")
        rows.append(row)
    if len(rows) < 2 or rows[0][0] != 0 or rows[-1][0] != 1:
        raise TraceError(f"{path}: the quantiles must begin with 0 and end with 1")
    return dict(zip(TABLE_COLUMNS, np.array(rows).T, strict=True))
