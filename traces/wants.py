"""What requests want and whose they are: the columns that a trace need not have, and what may stand in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qllm.traces.requests.trace import RequestTrace

BOUNDS = ("max_ttft_s", "max_tpot_s")
#: Column of our own file formats and of tables of results -> the one of `RequestTrace`.
WANTS = {"max_ttft_s": "max_ttft_s", "max_tpot_s": "max_tpot_s", "tenant": "tenants", "tags": "tags"}
#: What a column says of a request of which it says nothing.
NOTHING: dict[str, Any] = {"max_ttft_s": math.inf, "max_tpot_s": math.inf, "tenant": "", "tags": {}}
MOST_TEXT = 256  # characters of a tenant, of a tag's name, of its value
MOST_TAGS = 32  # of a request

BOUND = "a finite number > 0 (seconds)"
TENANT = f"printable text of up to {MOST_TEXT} characters without blanks at its ends"
TAGS = (
    f"up to {MOST_TAGS} names with a text each, 1 to {MOST_TEXT} printable characters without blanks at their ends, "
    "no ; in them and no = in a name"
)


def is_tenant(value: object) -> bool:
    """Whether `value` may name a tenant; "" names none."""
    return value == "" or _is_text(value)


def is_tags(value: object) -> bool:
    """Whether `value` may be a request's tags: written to CSV and read again they are the same."""
    return (
        isinstance(value, Mapping)
        and len(value) <= MOST_TAGS
        and all(_is_text(part) and ";" not in part for pair in value.items() for part in pair)
        and not any("=" in name for name in value)
    )


def _is_text(value: object) -> bool:
    fits = isinstance(value, str) and 0 < len(value) <= MOST_TEXT
    return fits and value.isprintable() and value == value.strip()  # type: ignore[attr-defined]


def cell_of(tags: Mapping[str, str]) -> str:
    """Tags as a CSV file and a table of results hold them: lane=batch;region=eu."""
    return ";".join(f"{name}={value}" for name, value in tags.items())


def tags_of(cell: str) -> dict[str, str]:
    """What `cell_of` wrote. ValueError for what it does not write."""
    pairs = [pair.partition("=") for pair in cell.split(";")] if cell else []
    found = {name: value for name, _, value in pairs}
    if len(found) < len(pairs) or not is_tags(found):
        raise ValueError
    return found


def first_odd(column: Sequence[Any], fits: Callable[[Any], bool]) -> int | None:
    """The index of the first element that does not fit, None if all do. What many requests share is looked at once."""
    seen: set[int] = set()
    for i, value in enumerate(column):
        if id(value) not in seen:
            if not fits(value):
                return i
            seen.add(id(value))
    return None


def describe_wants(trace: RequestTrace) -> dict[str, Any]:
    """How many requests have what, ready for JSON: nothing of a column that the trace lacks."""
    found: dict[str, Any] = {}
    for name in BOUNDS:
        column = getattr(trace, name)
        if column is not None:
            some = column[column < math.inf]
            p50 = float(np.median(some))
            found[name] = {"requests": len(some), "min": float(some.min()), "p50": p50, "max": float(some.max())}
    if trace.tenants is not None:
        named = [tenant for tenant in trace.tenants if tenant]
        found["tenants"] = {"requests": len(named), "tenants": len(set(named))}
    if trace.tags is not None:
        found["tags"] = dict(Counter(name for tags in trace.tags for name in tags))
    return found
