"""Write a request trace in this project's own CSV or JSONL; reading it back gives the same trace, bit for bit.

Arrivals that begin after 1e9 s (31 years) are dates to the readers: these move the first one to 0.
"""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

from qllm.traces.requests._columns import CLASS_COLUMN, CLASSES_HEADER, HASH_BLOCK, HASH_IDS, OWN_COLUMNS
from qllm.traces.requests.trace import RequestTrace, TraceError, TraceWarning
from qllm.traces.session_rows import FOLLOWS, THINK
from qllm.traces.wants import cell_of


def write_requests(trace: RequestTrace, path: str | Path, *, comment: str = "") -> None:
    """Write a request trace. It names the classes in order: CSV in a line below the comment, JSONL in a first object.

    Columns of bounds, tenants, tags and of who follows whom are there if the trace has some; an empty cell, or no key,
    where a request has none. Which prompts begin alike stands in JSONL only (hash_ids); a TraceWarning says that CSV
    lacks it.

    Args:
        trace: The requests.
        path: Its suffix (.csv or .jsonl) chooses the format.
        comment: Where the trace comes from, its licence: lines behind '# ', in CSV only.

    Raises:
        TraceError: Another suffix, a comment in JSONL, a trace without requests, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise TraceError(f"{path}: a trace is written as .csv or .jsonl, not {path.suffix or 'without a suffix'!r}")
    if not len(trace):
        raise TraceError(f"{path}: a trace without requests is not written")
    if comment and path.suffix == ".jsonl":
        raise TraceError(f"{path}: JSONL holds no comment; write .csv")
    wanted = trace.wanted()
    declared: dict[str, Any] = {CLASSES_HEADER: trace.classes}
    if trace.prefixes is not None and path.suffix == ".jsonl":
        declared[HASH_BLOCK] = trace.prefixes.block_tokens
        wanted[HASH_IDS] = [trace.prefixes.of(i) or None for i in range(len(trace))]
    elif trace.prefixes is not None:
        warnings.warn(f"{path}: {HASH_IDS} (prompts that begin alike) are left out; .jsonl has them", TraceWarning, 2)
    if trace.sessions is not None:
        follows, think_s = trace.sessions.follows.tolist(), trace.sessions.think_s.tolist()
        wanted[FOLLOWS] = [None if i < 0 else i for i in follows]
        wanted[THINK] = [None if i < 0 else seconds for i, seconds in zip(follows, think_s, strict=True)]
    header = (*OWN_COLUMNS, CLASS_COLUMN, *wanted)
    names = [trace.classes[i] for i in trace.cls.tolist()]
    if path.suffix == ".csv" and "tags" in wanted:
        wanted["tags"] = [None if tags is None else cell_of(tags) for tags in wanted["tags"]]
    columns = (trace.arrival.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), names)
    rows = zip(*columns, *wanted.values(), strict=True)
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                file.writelines(f"# {line}\n" for line in comment.splitlines())
                file.write(f"# {CLASSES_HEADER}: {json.dumps(trace.classes)}\n")
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(header)
                writer.writerows(rows)
            else:
                file.write(json.dumps(declared) + "\n")
                told = ({k: v for k, v in zip(header, row, strict=True) if v is not None} for row in rows)
                file.writelines(json.dumps(row) + "\n" for row in told)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
