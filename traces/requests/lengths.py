"""Draw prompt and output lengths, in tokens: fixed, uniform, lognormal, from a quantile table, or from a trace.

Every function returns int64[n], each >= 1.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.requests._columns import text_lines
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError, check_keys, check_positive

BUNDLED = Path(__file__).parents[1] / "data" / "lengths"
TABLE_COLUMNS = ("quantile", "prompt_tokens", "output_tokens")
COLUMN = {"prompt": "prompt_tokens", "output": "output_tokens"}


def bundled_lengths() -> list[str]:
    """Names of the quantile tables that ship with the project."""
    return sorted(path.stem for path in BUNDLED.glob("*.csv"))


def draw_lengths(rng: np.random.Generator, n: int, spec: Any, *, column: str, where: str) -> np.ndarray:
    """`n` lengths by a one-key mapping; `column` (prompt or output) says which one a table or a trace gives.

    {"fixed": N}              always N
    {"uniform": [LOW, HIGH]}  integers, both ends included
    {"lognormal": {"median": tokens, "sigma": S, "min": tokens, "max": tokens}}, see `lognormal`
    {"quantiles": NAME}       a bundled table (`bundled_lengths`) or a path to one, see `quantiles`
    {"trace": PATH}           a column of a trace, drawn with replacement

    Raises TraceError, which begins with the key `where`.
    """
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in LENGTHS:
        raise TraceError(f"{where}: {spec!r} must be a mapping with one key of: {', '.join(LENGTHS)}")
    ((kind, settings),) = spec.items()
    try:
        return LENGTHS[kind](rng, n, settings, column)
    except TraceError as error:
        raise TraceError(f"{where}.{kind}: {error}") from None


def draw_pairs(rng: np.random.Generator, n: int, spec: Any, *, where: str) -> tuple[np.ndarray, np.ndarray]:
    """`n` (prompt, output) pairs, whole rows of {"trace": PATH} drawn with replacement, so that they stay a pair."""
    check_keys(where, spec, ("trace",))
    try:
        trace = _load_trace(spec["trace"])
    except TraceError as error:
        raise TraceError(f"{where}.trace: {error}") from None
    rows = rng.integers(len(trace), size=n)
    return trace.prompt_tokens[rows], trace.output_tokens[rows]


def fixed(rng: np.random.Generator, n: int, tokens: Any, column: str) -> np.ndarray:
    return np.full(n, _tokens("", tokens), dtype=np.int64)


def uniform(rng: np.random.Generator, n: int, ends: Any, column: str) -> np.ndarray:
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise TraceError(f"{ends!r} must be [low, high]")
    low, high = (_tokens("", end) for end in ends)
    if low > high:
        raise TraceError(f"{ends!r} must be [low, high] with low <= high")
    return low + np.floor(rng.random(n) * (high - low + 1)).astype(np.int64)


def lognormal(rng: np.random.Generator, n: int, settings: Any, column: str) -> np.ndarray:
    """exp(normal(mu, sigma)), rounded; mu = ln(median), or ln(mean) - sigma**2 / 2.

    `median` or `mean` in tokens, before clipping; `sigma`, 0 to 10, the standard deviation of the logarithm. What lies
    outside [`min`, `max`] (tokens; 1 and no bound by default) is set to the bound, not drawn again: the bounds gain
    the mass beyond them, and the mean moves.
    """
    check_keys("keys", settings, ("sigma",), ("median", "mean", "min", "max"))
    if ("median" in settings) == ("mean" in settings):
        raise TraceError("give either median or mean")
    centre = "median" if "median" in settings else "mean"
    for key in (centre, "sigma"):
        check_positive(key, settings[key])
    sigma = settings["sigma"]
    if sigma > 10:
        raise TraceError(f"sigma: {sigma!r} must be at most 10")
    mu = math.log(settings[centre]) - (sigma**2 / 2 if centre == "mean" else 0.0)
    low = _tokens("min", settings.get("min", 1))
    high = _tokens("max", settings["max"]) if "max" in settings else 2**53
    if low > high:
        raise TraceError(f"min {low} is above max {high}")
    # The exponent is cut where float64 would overflow; the bound cuts far below.
    drawn = np.exp(np.minimum(mu + sigma * rng.standard_normal(n), 700.0))
    if "max" not in settings and n and drawn.max() > high:
        raise TraceError(f"draws {drawn.max():g} tokens: give a max")
    return np.rint(np.clip(drawn, low, high)).astype(np.int64)


def quantiles(rng: np.random.Generator, n: int, table: Any, column: str) -> np.ndarray:
    """Inverse of the distribution function that joins the table's quantiles by straight lines, rounded."""
    known = _load_table(table)
    return np.rint(np.interp(rng.random(n), known["quantile"], known[COLUMN[column]])).astype(np.int64)


def from_trace(rng: np.random.Generator, n: int, path: Any, column: str) -> np.ndarray:
    trace = _load_trace(path)
    return getattr(trace, COLUMN[column])[rng.integers(len(trace), size=n)]


LENGTHS: dict[str, Callable[[np.random.Generator, int, Any, str], np.ndarray]] = {
    "fixed": fixed,
    "uniform": uniform,
    "lognormal": lognormal,
    "quantiles": quantiles,
    "trace": from_trace,
}


def _tokens(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value < 2**53:
        raise TraceError(f"{name + ': ' if name else ''}{value!r} must be an integer >= 1 (tokens)")
    return int(value)


def _load_trace(path: Any) -> RequestTrace:
    path = _existing(path)
    return _read_trace(path, *_version(path))


def _load_table(name: Any) -> dict[str, np.ndarray]:
    bundled = BUNDLED / f"{name}.csv"
    try:
        path = bundled if str(name) in bundled_lengths() else _existing(name)
    except TraceError as error:
        raise TraceError(f"{error}; bundled tables: {', '.join(bundled_lengths())}") from None
    return _read_table(path, *_version(path))


def _existing(path: Any) -> Path:
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        raise TraceError(f"{str(path)!r} is no file")
    return Path(path)


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# A sweep draws from one file many times over; a changed file has another version.
@lru_cache(maxsize=8)
def _read_trace(path: Path, changed_ns: int, size: int) -> RequestTrace:
    return read_requests(path)


@lru_cache(maxsize=8)
def _read_table(path: Path, changed_ns: int, size: int) -> dict[str, np.ndarray]:
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
