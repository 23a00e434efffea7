"""Prompt and output lengths in tokens, int64[n], each >= 1. `column` says which of the two a table or trace gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qllm.traces.files import file_stamp
from qllm.traces.requests._columns import TIME_UNITS
from qllm.traces.requests._time_units import UNITS
from qllm.traces.requests.quantile_table import load_table
from qllm.traces.requests.readers import detect_format, read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError

if TYPE_CHECKING:
    from qllm.traces.requests.recipe import Length, Lognormal, Pairs

COLUMN = {"prompt": "prompt_tokens", "output": "output_tokens"}


def draw_lengths(rng: np.random.Generator, n: int, length: Length, *, column: str) -> np.ndarray:
    """`n` lengths. TraceError, which begins with the kind of length, where a file does not give them."""
    ((kind, settings),) = [(name, value) for name, value in length if value is not None]
    try:
        return DRAWS[kind](rng, n, settings, column)
    except TraceError as error:
        raise TraceError(f"{kind}: {error}") from None


def draw_pairs(rng: np.random.Generator, n: int, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """`n` (prompt, output) pairs: whole rows of a trace drawn with replacement, so that they stay a pair."""
    try:
        trace = _load_trace(pairs.trace)
    except TraceError as error:
        raise TraceError(f"trace: {error}") from None
    rows = rng.integers(len(trace), size=n)
    return trace.prompt_tokens[rows], trace.output_tokens[rows]


def fixed(_rng: np.random.Generator, n: int, tokens: int, _column: str) -> np.ndarray:
    """Always `tokens`."""
    return np.full(n, tokens, dtype=np.int64)


def uniform(rng: np.random.Generator, n: int, ends: list[int], _column: str) -> np.ndarray:
    """Integers from [low, high], both ends included."""
    low, high = ends
    return low + np.floor(rng.random(n) * (high - low + 1)).astype(np.int64)


def lognormal(rng: np.random.Generator, n: int, settings: Lognormal, _column: str) -> np.ndarray:
    """See `Lognormal`."""
    if settings.median is not None:
        mu = math.log(settings.median)
    else:
        assert settings.mean is not None  # the model holds one of the two
        mu = math.log(settings.mean) - settings.sigma**2 / 2
    low, high = settings.min or 1, settings.max or 2**53
    # The exponent is cut where float64 would overflow; the bound cuts far below.
    drawn = np.exp(np.minimum(mu + settings.sigma * rng.standard_normal(n), 700.0))
    if settings.max is None and n and drawn.max() > high:
        raise TraceError(f"draws {drawn.max():g} tokens: give a max")
    tokens: np.ndarray = np.rint(np.clip(drawn, low, high)).astype(np.int64)
    return tokens


def quantiles(rng: np.random.Generator, n: int, table: str, column: str) -> np.ndarray:
    """Inverse of the distribution function that joins the table's quantiles by straight lines, rounded."""
    known = load_table(table)
    drawn = np.interp(rng.random(n), known["quantile"], known[COLUMN[column]])
    tokens: np.ndarray = np.rint(drawn).astype(np.int64)
    return tokens


def from_trace(rng: np.random.Generator, n: int, path: str, column: str) -> np.ndarray:
    """A column of a request trace, drawn with replacement."""
    trace = _load_trace(path)
    tokens: np.ndarray = getattr(trace, COLUMN[column])
    return tokens[rng.integers(len(trace), size=n)]


DRAWS: dict[str, Callable[[np.random.Generator, int, Any, str], np.ndarray]] = {
    "fixed": fixed,
    "uniform": uniform,
    "lognormal": lognormal,
    "quantiles": quantiles,
    "trace": from_trace,
}


def _load_trace(path: str) -> RequestTrace:
    return _read_trace(path, file_stamp(path))


# A sweep draws from one file many times over; a changed file has another stamp.
@lru_cache(maxsize=8)
def _read_trace(path: str, _: object) -> RequestTrace:
    format = detect_format(path)
    # Lengths need no arrivals, so no doubt about their unit matters.
    return read_requests(path, format, unit="s" if TIME_UNITS[format] in UNITS else None)
