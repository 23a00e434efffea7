"""Words for errors of one line: what was meant, what kind of value it is, where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime
from difflib import get_close_matches
from typing import Any

KeyPath = tuple[str | int, ...]


def dotted(key: KeyPath) -> str:
    """('policies', 3, 'name') -> 'policies.3.name'."""
    return ".".join(str(part) for part in key)


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """'did you mean X? allowed: A, B, C' for a word that is none of `allowed`."""
    names = list(allowed)
    close = get_close_matches(word, names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}allowed: {', '.join(names)}"


def kind(value: Any) -> str:
    """The YAML name of a value's type."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    names |= {date: "a date", datetime: "a date", bytes: "bytes", set: "a set"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """`value` for a message: text and numbers as they are, if short, else what kind it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 1 << 64 else "a number of more than 64 bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return repr(clipped(value))
    return str(value).lower() if isinstance(value, bool) else kind(value)


def clipped(text: str, most: int = 60) -> str:
    """Enough of `text` to find it again: `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type's name where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
