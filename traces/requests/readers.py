"""Read request traces: Azure and BurstGPT (CSV), Mooncake (JSONL), ShareGPT (JSON), and this project's own two.

Every reader sorts by arrival (stable) and, save for the project's own formats, moves the first arrival to 0.
A row that is not a request stops the reading with a TraceError that names file and line, unless `skip_invalid` is
asked for; then a TraceWarning says how many rows were left out and why the first one was.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from qllm.traces.requests._columns import (
    CLASSES_HEADER,
    CSV_COLUMNS,
    FORMATS,
    JSONL_COLUMNS,
    Columns,
    SkippedRows,
    text_lines,
)
from qllm.traces.requests._read_csv import read_csv
from qllm.traces.requests._read_json import Tokenizer, read_json
from qllm.traces.requests.trace import SINGLE_CLASS, RequestTrace, TraceError


def read_requests(
    path: str | Path,
    format: str | None = None,
    *,
    skip_invalid: bool = False,
    tokenizer: Tokenizer | None = None,
) -> RequestTrace:
    """Read one request trace.

    The formats:

        azure      TIMESTAMP, ContextTokens, GeneratedTokens: dates in UTC
        burstgpt   Timestamp (s), Request tokens, Response tokens; other columns are not used. The releases with
                   failures mark them by 0 response tokens: not a request, so an error unless `skip_invalid`
        mooncake   timestamp (ms), input_length, output_length a line; hash_ids (prefix sharing) are not used
        sharegpt   a list of {"id", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}: the
                   first two turns make one request, its lengths len(tokenizer(text)); without a `tokenizer` each
                   entry must hold integers "prompt_tokens" and "output_tokens". There are no arrivals: all are 0 and
                   `rate` is None (see `assign_arrivals`)
        csv, jsonl this project's own: arrival_s, prompt_tokens, output_tokens and, if it has classes, class

    A trace without classes has the one class "all" (see `assign_classes`).

    Args:
        path: The file.
        format: One of FORMATS; default: found from the content.
        skip_invalid: Leave out rows that are no requests, with a TraceWarning: the count and the first reason.
        tokenizer: From text to its tokens, for format sharegpt.

    Raises:
        TraceError: The file cannot be read, or a row is no request; the message names file and line.
    """
    path = Path(path)
    if format is None:
        format = detect_format(path)
    if format not in FORMATS:
        raise TraceError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    if tokenizer is not None and format != "sharegpt":
        raise TraceError(f"{path}: a tokenizer is of use only for format sharegpt, this is {format}")
    skipped = SkippedRows(path, skip_invalid)
    columns = read_csv(path, format, skipped) if format in CSV_COLUMNS else read_json(path, format, skipped, tokenizer)
    skipped.report()
    if not len(columns.arrival):
        raise TraceError(f"{path}: holds no request")
    return _trace(columns, shift=format not in ("csv", "jsonl"))


def detect_format(path: str | Path) -> str:
    """The format of a trace, from its first line; TraceError where it is none of FORMATS."""
    path = Path(path)
    number, first = next(
        ((i, s) for i, s in enumerate(map(str.strip, text_lines(path)), 1) if s and not s.startswith("#")), (1, "")
    )
    if not first:
        raise TraceError(f"{path}: is empty; known formats: {', '.join(FORMATS)}")
    if first.startswith("["):
        return "sharegpt"
    if first.startswith("{"):
        try:
            found = set(json.loads(first))
        except (json.JSONDecodeError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: is no JSON object: {error}") from None
        known = JSONL_COLUMNS
        if found == {CLASSES_HEADER}:
            return "jsonl"
    else:
        found = {name.strip() for name in next(csv.reader([first]))}
        known = CSV_COLUMNS
    for name, columns in known.items():
        if set(columns) <= found:
            return name
    formats = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in known.items())
    raise TraceError(f"{path}, line {number}: {first[:80]!r} has the columns of no known format: {formats}")


def _trace(columns: Columns, shift: bool) -> RequestTrace:
    order = np.argsort(columns.arrival, kind="stable")
    arrival = columns.arrival[order]
    if shift:
        arrival = arrival - arrival[0]
    if columns.names is None:
        classes, cls = columns.classes or SINGLE_CLASS, np.zeros(len(order), dtype=np.int64)
    else:
        classes = columns.classes or tuple(dict.fromkeys(columns.names))
        index = {name: i for i, name in enumerate(classes)}
        cls = np.array([index[name] for name in columns.names], dtype=np.int64)
    return RequestTrace(arrival, columns.prompt[order], columns.output[order], cls[order], classes)
