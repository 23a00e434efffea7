"""What the readers and the writer of request traces share: column names, and how a broken row is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.requests._prefixes import HashIds
from qllm.traces.requests._time_units import Number
from qllm.traces.requests.trace import TraceError, TraceWarning, check_classes
from qllm.traces.session_rows import SESSION_COLUMNS, SessionRows
from qllm.traces.wants import WANTS

OWN_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
CLASS_COLUMN = "class"
OPTIONAL = (CLASS_COLUMN, *WANTS, *SESSION_COLUMNS)  # what our own formats may have besides
CLASSES_HEADER = "classes"  # own formats name their classes in order, so that one without a request survives
HASH_IDS = "hash_ids"  # of our own formats only JSONL has them
HASH_BLOCK = "hash_block_tokens"  # stands beside `classes` where requests have hash_ids

# Format -> its columns: arrival, prompt tokens, output tokens.
CSV_COLUMNS = {
    "csv": OWN_COLUMNS,
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
}
JSONL_COLUMNS = {
    "jsonl": OWN_COLUMNS,
    "mooncake": ("timestamp", "input_length", "output_length"),
    "bailian": ("timestamp", "input_length", "output_length"),
}
FORMATS = (*CSV_COLUMNS, *JSONL_COLUMNS, "sharegpt")

# Format -> unit of its arrivals, a key of UNITS, or why there is none to choose.
TIME_UNITS = dict.fromkeys(FORMATS, "s") | {"mooncake": "ms", "azure": "dates", "sharegpt": "no arrivals"}


@dataclass
class Columns:
    """What a file holds, in its own order."""

    arrival: np.ndarray | Sequence[Number]  # seconds; or numbers in the format's unit, exact
    prompt: np.ndarray  # tokens
    output: np.ndarray
    names: list[str] | None = None  # the class of each row; None: no such column
    classes: tuple[str, ...] | None = None  # those that the file declares; None: it declares none
    wants: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # those of `WANTS` that there are
    hash_ids: HashIds | None = None  # of each row; None: the format has none
    hash_block: int | None = None  # tokens for each of them; None: the file does not say
    sessions: SessionRows | None = None  # who follows whom; None: the file does not say


class SkippedRows:
    """Rows that are no requests: an error at once, or counted where the caller asked to leave them out."""

    def __init__(self, path: Path, allowed: bool) -> None:
        self.path = path
        self.allowed = allowed
        self.count = 0
        self.first = ""

    def row(self, where: str, reason: str) -> None:
        """Leave out the row at `where`. TraceError where that is not allowed."""
        message = f"{where}: {reason}"
        if not self.allowed:
            raise TraceError(f"{self.path}, {message}")
        self.first = self.first or message
        self.count += 1

    def report(self) -> None:
        """Warn of what was left out."""
        if self.count:
            text = f"{self.path}: {self.count} invalid rows left out; the first: {self.first}"
            warnings.warn(text, TraceWarning, stacklevel=3)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends as they are; TraceError where it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: is no UTF-8 text: {error.reason} at byte {error.start}") from None


def class_problem(name: object, classes: tuple[str, ...] | None) -> str | None:
    """Why `name` cannot be a row's class, where `classes` are those that the file declares; None if it can."""
    if classes is not None:
        return None if name in classes else f"{CLASS_COLUMN} is {name!r}, must be one of {', '.join(classes)}"
    try:
        check_classes([name])  # type: ignore[list-item]
    except TraceError as error:
        return str(error)
    return None
