"""Read request traces: Azure, BurstGPT (CSV), Mooncake, Qwen-Bailian (JSONL), ShareGPT (JSON), and our own two.

Every reader sorts by arrival (stable) and moves the first arrival to 0, before anything is rounded to float64. The
project's own formats keep their arrivals, unless these are dates (seconds since 1970).
A row that is not a request stops the reading with a TraceError that names file and line, unless `skip_invalid` is
asked for; then a TraceWarning says how many rows were left out and why the first one was.
"""

from __future__ import annotations

import csv
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.files import not_regular
from qllm.traces.prefixes import describe_prefixes
from qllm.traces.requests._columns import (
    CLASSES_HEADER,
    CSV_COLUMNS,
    FORMATS,
    HASH_BLOCK,
    JSONL_COLUMNS,
    TIME_UNITS,
    Columns,
    SkippedRows,
    text_lines,
)
from qllm.traces.requests._prefixes import USUAL_BLOCK
from qllm.traces.requests._read_csv import read_csv
from qllm.traces.requests._read_json import Tokenizer, read_json
from qllm.traces.requests._time_units import BAILIAN_KEYS, UNITS, check_magnitude, seconds, unit_doubt
from qllm.traces.requests.trace import SINGLE_CLASS, RequestTrace, TraceError
from qllm.traces.session_rows import FOLLOWING_FORMATS
from qllm.traces.wants import WANTS


def read_requests(
    path: str | Path,
    format: str | None = None,
    *,
    unit: str | None = None,
    skip_invalid: bool = False,
    tokenizer: Tokenizer | None = None,
    sessions: bool = False,
) -> RequestTrace:
    """Read one request trace.

    The formats:

        azure      TIMESTAMP, ContextTokens, GeneratedTokens: dates in UTC
        burstgpt   Timestamp (s), Request tokens, Response tokens; other columns are not used. The releases with
                   failures mark them by 0 response tokens: not a request, so an error unless `skip_invalid`
        mooncake   timestamp (ms), input_length, output_length a line
        bailian    Qwen-Bailian's: Mooncake's keys, but timestamp in seconds, and chat_id, parent_chat_id, turn
        sharegpt   a list of {"id", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}: the
                   first two turns make one request, its lengths len(tokenizer(text)); without a `tokenizer` each
                   entry must hold integers "prompt_tokens" and "output_tokens". There are no arrivals: all are 0 and
                   `rate` is None (see `assign_arrivals`)
        csv, jsonl this project's own: arrival_s, prompt_tokens, output_tokens and, if it has classes, class; as it has
                   them, max_ttft_s and max_tpot_s (seconds), tenant and tags (lane=batch;region=eu, in jsonl an object
                   of texts). An empty cell, null or a missing key of these four says nothing of the request. follows
                   and think_s say which row comes before it (rows count from 0, broken ones too) and how many seconds
                   lie between that one's end and its arrival

    Counts may be written 1087.0. `format` or `unit` is needed where rows do not say whether they are Mooncake's or
    Qwen-Bailian's; `unit` where the first arrival would be a date in another unit. The hash_ids of these two and of
    our own jsonl (prompts that begin alike) become the trace's `prefixes`. What was read, and how, stands in its
    `source`; there also what share of the prompt tokens a prefix cache without limit would hold.

    A trace without classes has the one class "all" (see `assign_classes`).

    Args:
        path: The file.
        format: One of FORMATS; default: found from the content.
        unit: Of the arrivals, "s", "ms", "us" or "ns"; default: what the format says.
        skip_invalid: Leave out rows that are no requests, with a TraceWarning: the count and the first reason.
        tokenizer: From text to its tokens, for format sharegpt.
        sessions: Of Qwen-Bailian's traces, whether a chat follows its parent: it then arrives late, once that one has
            ended and its client has thought as long as lay between the two arrivals. That is longer than in truth, by
            the time of the answer, which the trace does not hold.

    Raises:
        TraceError: The file cannot be read, or a row is no request; the message names file and line.
    """
    path = Path(path)
    if path.name and os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise TraceError(f"{path}: {not_regular(path)}; expected a request trace")
    detected = format is None
    format = detect_format(path) if format is None else format
    if format not in FORMATS:
        raise TraceError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    usual = TIME_UNITS[format]
    if unit is not None and unit not in UNITS:
        raise TraceError(f"unit {unit!r}: must be one of {', '.join(UNITS)}")
    if unit is not None and usual not in UNITS:
        raise TraceError(f"{path}: format {format} has {usual}; leave unit out")
    if tokenizer is not None and format != "sharegpt":
        raise TraceError(f"{path}: a tokenizer is of use only for format sharegpt, this is {format}")
    if sessions and format not in FOLLOWING_FORMATS:
        told = f"{', '.join(FOLLOWING_FORMATS)}; or leave sessions out"
        raise TraceError(f"{path}: rows of format {format} do not say whom they follow; allowed: {told}")
    skipped = SkippedRows(path, skip_invalid)
    if format in CSV_COLUMNS:
        columns = read_csv(path, format, skipped)
    else:
        doubts = None if unit else partial(unit_doubt, format, detected)
        columns = read_json(path, format, skipped, tokenizer, doubts, sessions and format == "bailian")
    skipped.report()
    if not len(columns.arrival):
        raise TraceError(f"{path}: holds no request")
    source: dict[str, Any] = {"format": format, "time_unit": unit or usual}
    if skip_invalid:
        source["skipped_rows"] = skipped.count
    if not isinstance(columns.arrival, np.ndarray):
        if usual in UNITS and unit is None:
            check_magnitude(path, columns.arrival, usual)
        scale = unit or (usual if usual in UNITS else "s")
        columns.arrival = seconds(columns.arrival, scale, from_first=format not in ("csv", "jsonl"))
    return _trace(path, columns, columns.arrival, source)


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
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: is no JSON object: {error}") from None
        known = JSONL_COLUMNS
        if CLASSES_HEADER in found <= {CLASSES_HEADER, HASH_BLOCK}:
            return "jsonl"
    else:
        found = {name.strip() for name in next(csv.reader([first]))}
        known = CSV_COLUMNS
    for name, columns in known.items():
        if set(columns) <= found:
            return "bailian" if name == "mooncake" and found >= {*BAILIAN_KEYS} else name
    formats = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in known.items())
    raise TraceError(f"{path}, line {number}: {first[:80]!r} has the columns of no known format: {formats}")


def _trace(path: Path, columns: Columns, arrival: np.ndarray, source: dict[str, Any]) -> RequestTrace:
    order = np.argsort(arrival, kind="stable")
    prompt = columns.prompt[order]
    prefixes = None
    if columns.hash_ids:
        usual = USUAL_BLOCK[source["format"]]
        prefixes = columns.hash_ids.prefixes(order, prompt, columns.hash_block, usual)
        source["prefixes"] = describe_prefixes(prefixes, prompt)
    if columns.names is None:
        classes, cls = columns.classes or SINGLE_CLASS, np.zeros(len(order), dtype=np.int64)
    else:
        classes = columns.classes or tuple(dict.fromkeys(columns.names))
        index = {name: i for i, name in enumerate(classes)}
        cls = np.array([index[name] for name in columns.names], dtype=np.int64)
    try:
        sessions = columns.sessions.sessions(arrival, order) if columns.sessions else None
    except ValueError as error:
        raise TraceError(f"{path}, {error}") from None
    wants: dict[str, Any] = {WANTS[name]: [column[i] for i in order.tolist()] for name, column in columns.wants.items()}
    return RequestTrace(
        arrival[order],
        prompt,
        columns.output[order],
        cls[order],
        classes,
        source,
        sessions=sessions,
        prefixes=prefixes,
        **wants,
    )
