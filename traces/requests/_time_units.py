"""Arrival times as files write them, to seconds: whole numbers and decimals stay exact until they are differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.requests.trace import TraceError

Number = int | Decimal

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # how many make a second
EPOCH_S = 10**9  # a trace that begins later (31 years) counts from a clock's epoch, such as 1970
LATEST_S = 10**11  # the year 5138 of that clock: no trace begins later

BAILIAN_KEYS = ("chat_id", "parent_chat_id", "turn")  # what Qwen-Bailian's rows have besides Mooncake's keys
_CHOICE = f"say which by format (mooncake: ms, bailian: s) or by unit ({', '.join(UNITS)})"


def number(value: object) -> Number | None:
    """`value` where it is a finite number >= 0 that float64 holds, else None. JSON's true and text are none."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    try:
        return value if 0 <= float(value) < math.inf else None
    except (OverflowError, ValueError):  # an integer beyond float64; a signalling NaN
        return None


def bound(value: object) -> float:
    """`value` as seconds where it is a finite number > 0 that float64 holds. ValueError where it is not."""
    found = number(value)
    if found is None or not float(found) > 0:
        raise ValueError
    return float(found)


def whole(value: object) -> int | None:
    """`value` as a count where it is a whole number from 1, 1087.0 as well as 1087, else None."""
    found = number(value)
    if found is None or not 1 <= found < 2**63:
        return None
    count = int(found)
    return count if count == found else None


def row_number(value: Number) -> int | None:
    """`value` as the number of a row where it is a whole one from 0, else None."""
    return 0 if value == 0 else whole(value)


def seconds(values: Sequence[Number], unit: str, *, from_first: bool) -> np.ndarray:
    """Arrivals in `unit` as seconds, float64[n]; `from_first` takes the earliest off while the numbers are exact."""
    first = min(values)
    per_second = UNITS[unit]
    if not from_first and first <= EPOCH_S * per_second:
        first = 0
    if first == 0 and per_second == 1:
        return np.fromiter(map(float, values), np.float64, len(values))
    return np.array([float((value - first) / per_second) for value in values], dtype=np.float64)


def check_magnitude(path: Path, values: Sequence[Number], unit: str) -> None:
    """TraceError where arrivals that nobody gave a unit for begin at what is a date of today in another unit."""
    first = min(values)
    date = unit != "s" and EPOCH_S <= first < 10 * EPOCH_S
    if date or first >= LATEST_S * UNITS[unit]:
        told = f"{first / UNITS[unit]:.4g} s after the trace's start" if date else "beyond the year 5000"
        raise TraceError(
            f"{path}: the arrivals begin at {first}: {told} if these are {unit}, a date in another unit; "
            f"say which by unit ({', '.join(UNITS)})"
        )


def unit_doubt(format: str, detected: bool, row: Mapping[str, Any]) -> str | None:
    """Why the unit of a row's timestamp is in doubt, in formats that share their keys; None where it is not."""
    own = [key for key in BAILIAN_KEYS if key in row]
    time = row.get("timestamp")
    if format == "mooncake" and own:
        return f"{own[0]} is a key of Qwen-Bailian's traces (seconds), not of Mooncake's (milliseconds); {_CHOICE}"
    if format == "mooncake" and detected and isinstance(time, Decimal) and time != time.to_integral_value():
        return f"timestamp is {time}, Mooncake's are whole milliseconds, and Qwen-Bailian's beside chat_id; {_CHOICE}"
    if format == "bailian" and detected and len(own) < len(BAILIAN_KEYS):
        lacking = next(key for key in BAILIAN_KEYS if key not in row)
        return f"has no {lacking}, a key of Qwen-Bailian's traces, as the first row has; {_CHOICE}"
    return None
