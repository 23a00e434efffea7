"""The JSON formats: one object a line (Mooncake, our own), or one list of conversations (ShareGPT)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sized
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from qllm.traces.messages import clipped
from qllm.traces.requests._columns import (
    CLASS_COLUMN,
    CLASSES_HEADER,
    HASH_BLOCK,
    HASH_IDS,
    JSONL_COLUMNS,
    OPTIONAL,
    OWN_COLUMNS,
    Columns,
    SkippedRows,
    class_problem,
    text_lines,
)
from qllm.traces.requests._prefixes import USUAL_BLOCK, HashIds
from qllm.traces.requests._time_units import Number, bound, number, row_number, whole
from qllm.traces.requests.trace import TraceError, check_classes
from qllm.traces.session_rows import (
    FOLLOWS,
    FOLLOWS_ALLOWED,
    THINK,
    THINK_ALLOWED,
    SessionRows,
    row_problem,
)
from qllm.traces.wants import BOUND, BOUNDS, NOTHING, TAGS, TENANT, WANTS, is_tags, is_tenant

Tokenizer = Callable[[str], Sized]

Doubts = Callable[[dict[str, Any]], str | None]

Request = tuple[Number, int, int]


class _BadRow(Exception):
    """Why one row is no request; the reader adds file and line."""


def read_json(
    path: Path, format: str, skipped: SkippedRows, tokenizer: Tokenizer | None, doubts: Doubts | None, chats: bool
) -> Columns:
    """The columns of one JSON or JSONL trace; TraceError names the file and the line (or the list's entry).

    `doubts`: why the unit of a row's timestamp is in doubt, or None; None: the caller gave the unit. `chats`: whether a
    chat of Qwen-Bailian's follows its parent.
    """
    columns = JSONL_COLUMNS.get(format, OWN_COLUMNS)
    classes: tuple[str, ...] | None = None
    requests: list[Request] = []
    names: list[str] = []
    wants: list[dict[str, Any]] = []
    hash_ids, hash_block = HashIds() if format in USUAL_BLOCK else None, None
    sessions = SessionRows() if format == "jsonl" or chats else None
    for where, row, entry in _array(path) if format == "sharegpt" else _lines(path, skipped):
        try:
            if not isinstance(entry, dict):
                raise _BadRow(f"is {_short(entry)}, must be an object {{...}}")
            if format == "sharegpt":
                requests.append(_conversation(entry, tokenizer))
                continue
            if format == "jsonl":
                if CLASSES_HEADER in entry and not requests:
                    classes, hash_block = _declared(path, where, entry)
                    continue
                _check_keys(entry, hash_block)
            doubt = doubts(entry) if doubts else None
            if doubt:
                raise TraceError(f"{path}, {where}: {doubt}")
            request = (_time(entry, columns[0]), _tokens(entry, columns[1]), _tokens(entry, columns[2]))
            if format == "jsonl":
                mine = _wants(entry)
                if (CLASS_COLUMN in entry) != bool(names) and requests:
                    raise _BadRow(f"every line names its {CLASS_COLUMN}, or none does")
                if CLASS_COLUMN in entry:
                    problem = class_problem(entry[CLASS_COLUMN], classes)
                    if problem:
                        raise _BadRow(problem)
                    names.append(entry[CLASS_COLUMN])
                wants.append(mine)
            said: tuple[Any, Any, float | None] | None = None
            if sessions is not None:
                said = _chat(entry) if chats else _follows(entry, row - (classes is not None))
            if hash_ids is not None:
                hash_ids.add(_hash_ids(entry, hash_block))
            if sessions is not None and said:
                sessions.add(*said, int(where.split()[1]))
            requests.append(request)
        except _BadRow as error:
            skipped.row(where, str(error))
    arrival, prompt, output = zip(*requests, strict=True) if requests else ((), (), ())
    prompts, outputs = (np.array(column, dtype=np.int64) for column in (prompt, output))
    there = {name for row in wants for name in row}
    found = {name: [row.get(name, NOTHING[name]) for row in wants] for name in there}
    return Columns(arrival, prompts, outputs, names or None, classes, found, hash_ids, hash_block, sessions)


def _lines(path: Path, skipped: SkippedRows) -> Iterator[tuple[str, int, Any]]:
    """Where each row stands, its number from 0 on, and what it holds."""
    row = -1
    for count, line in enumerate(text_lines(path), start=1):
        if line.strip():
            row += 1
            try:
                yield f"line {count}", row, _loads(line)
            except (ValueError, RecursionError) as error:
                skipped.row(f"line {count}", f"is no JSON object: {error}")


def _loads(text: str) -> Any:
    """JSON, its numbers exact. ValueError where a key stands twice: Python would drop the first."""
    return json.loads(text, parse_float=Decimal, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(key for key in found if [k for k, _ in pairs].count(key) > 1)!r} stands twice")
    return found


def _array(path: Path) -> Iterator[tuple[str, int, Any]]:
    try:
        entries = _loads("".join(text_lines(path)))
    except TraceError:
        raise
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: is no JSON: {error}") from None
    if not isinstance(entries, list):
        raise TraceError(f"{path}: must be a JSON list of conversations")
    for row, entry in enumerate(entries):
        yield f"entry {row + 1}", row, entry


def _conversation(entry: dict[str, Any], tokenizer: Tokenizer | None) -> Request:
    """The first prompt and its answer, measured by the tokenizer or with the lengths that the entry gives."""
    for columns in JSONL_COLUMNS.values():
        if columns[0] in entry:
            raise _BadRow(f"has the key {columns[0]}, which no conversation has; allowed: such objects one a line")
    if tokenizer is None:
        if "prompt_tokens" not in entry:
            raise _BadRow("has no prompt_tokens and output_tokens: add them, or give a tokenizer")
        return 0, _tokens(entry, "prompt_tokens"), _tokens(entry, "output_tokens")
    turns = entry.get("conversations")
    turns = turns[:2] if isinstance(turns, list) else []
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if speakers != ["human", "gpt"]:
        raise _BadRow(f"conversations begins with {_short(speakers)}, must begin with a human and a gpt turn")
    prompt, output = (_measured(turn, tokenizer) for turn in turns)
    return 0, prompt, output


def _measured(turn: dict[str, Any], tokenizer: Tokenizer) -> int:
    text = turn.get("value")
    tokens = len(tokenizer(text)) if isinstance(text, str) else 0
    if tokens < 1:
        raise _BadRow(f"the {turn['from']} turn is {_short(text)}, must be text of >= 1 tokens")
    return tokens


def _check_keys(entry: dict[str, Any], hash_block: int | None) -> None:
    allowed = (*OWN_COLUMNS, *OPTIONAL, *([] if hash_block is None else [HASH_IDS]))
    if HASH_IDS in entry and hash_block is None:
        raise _BadRow(f'{HASH_IDS} need a first line such as {{"{CLASSES_HEADER}": ["all"], "{HASH_BLOCK}": 16}}')
    for key in entry:
        if key not in allowed:
            raise _BadRow(f"unknown key {key!r}; allowed: {', '.join(allowed)}")


def _wants(entry: dict[str, Any]) -> dict[str, Any]:
    """What a row says of `WANTS`; null says nothing."""
    found = {name: entry[name] for name in WANTS if entry.get(name) is not None}
    for name, value in found.items():
        try:
            if name in BOUNDS:
                found[name] = bound(value)
            elif not (is_tenant if name == "tenant" else is_tags)(value):
                raise ValueError
        except ValueError:
            raise _BadRow(f"{name} is {_short(value)}, must be {_ALLOWED[name]}") from None
    return found


def _follows(entry: dict[str, Any], row: int) -> tuple[int, int | None, float]:
    """The number of the row `entry`, that of the row which it follows, and its think time in seconds."""
    given, think = entry.get(FOLLOWS), number(entry.get(THINK))
    found = number(given)
    follows = None if found is None else row_number(found)
    for name, value in ((FOLLOWS, follows), (THINK, think)):
        if value is None and entry.get(name) is not None:
            raise _BadRow(f"{name} is {_short(entry[name])}, must be {_ALLOWED[name]}")
    problem = row_problem(row, follows, None if think is None else float(think))
    if problem:
        raise _BadRow(problem)
    return row, follows, float(think or 0)


def _chat(entry: dict[str, Any]) -> tuple[int | str, int | str | None, None]:
    """The chat of a row of Qwen-Bailian's and its parent, None for the first turn. Its think time is not told."""
    for key in ("chat_id", "parent_chat_id"):
        if not isinstance(entry.get(key), int | str) or isinstance(entry[key], bool):
            raise _BadRow(f"{key} is {_short(entry.get(key))}, must be an integer or text; a first turn's parent is -1")
    parent = entry["parent_chat_id"]
    return entry["chat_id"], None if parent in (-1, "-1", "") else parent, None


def _tokens(entry: dict[str, Any], key: str) -> int:
    count = whole(entry.get(key))
    if count is None:
        raise _BadRow(f"{key} is {_short(entry.get(key))}, must be an integer >= 1")
    return count


def _time(entry: dict[str, Any], key: str) -> Number:
    time = number(entry.get(key))
    if time is None:
        raise _BadRow(f"{key} is {_short(entry.get(key))}, must be a number >= 0")
    return time


def _hash_ids(entry: dict[str, Any], block: int | None) -> list[int | str]:
    ids = entry.get(HASH_IDS, [])
    if not isinstance(ids, list) or not {*map(type, ids)} <= {int, str}:
        raise _BadRow(f"{HASH_IDS} is {_short(ids)}, must be a list of integers or texts")
    if block is not None:
        tokens = int(entry["prompt_tokens"]) + int(entry["output_tokens"])
        if len(ids) * block > tokens:
            raise _BadRow(f"{HASH_IDS} has {len(ids)} ids for {tokens} tokens, must have {tokens // block} at most")
    return ids


def _declared(path: Path, where: str, entry: dict[str, Any]) -> tuple[tuple[str, ...], int | None]:
    unknown = next((key for key in entry if key not in (CLASSES_HEADER, HASH_BLOCK)), None)
    if unknown is not None:
        raise TraceError(f"{path}, {where}: unknown key {unknown!r}; allowed: {CLASSES_HEADER}, {HASH_BLOCK}")
    block = whole(entry[HASH_BLOCK]) if HASH_BLOCK in entry else None
    if HASH_BLOCK in entry and block is None:
        raise TraceError(f"{path}, {where}: {HASH_BLOCK} is {_short(entry[HASH_BLOCK])}, must be an integer >= 1")
    try:
        return check_classes(entry[CLASSES_HEADER]), block
    except TraceError as error:
        raise TraceError(f"{path}, {where}: {CLASSES_HEADER} must be a list of names: {error}") from None


_ALLOWED = dict.fromkeys(BOUNDS, f"{BOUND}, or null") | {
    "tenant": f"{TENANT}, or null",
    FOLLOWS: f"{FOLLOWS_ALLOWED}, or null",
    THINK: f"{THINK_ALLOWED}, or null",
    "tags": f'an object as {{"lane": "batch"}}, or null: {TAGS}',
}


def _short(value: object) -> str:
    return clipped(str(value) if isinstance(value, Decimal) else json.dumps(value, default=str))
