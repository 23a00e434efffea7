"""What is wrong with the lines of a batch's input, as the API tells it: a code, a message and the line's number."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any, NamedTuple

from qllm.server.batches.pauses import with_pauses

#: The endpoints whose requests may stand in a batch.
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
MOST_ERRORS = 100  #: told of one file
KEYS = ("custom_id", "method", "url", "body")


class Line(NamedTuple):
    """One request of a batch; `body` is JSON."""

    number: int
    custom_id: str
    body: str


def check_lines(content: bytes, endpoint: str, most: int) -> tuple[list[Line], list[dict[str, Any]]]:
    """The lines of a file, or what is wrong with them.

    Args:
        content: JSON lines; blank ones do not count.
        endpoint: to which all of them must go.
        most: lines that a batch may have.

    Returns:
        The lines, numbered as in the file from 1; and the errors, in order. With errors no line is run.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, raw in enumerate(with_pauses(BytesIO(content)), start=1):
        if not raw.strip():
            continue
        if len(lines) == most:
            errors.append(_error("too_many_tasks", f"A batch has at most {most} requests.", number))
            break
        found = _check(raw, endpoint, seen)
        if isinstance(found, tuple):
            seen.add(found[0])
            lines.append(Line(number, *found))
            continue
        errors.append({**found, "line": number})
        if len(errors) == MOST_ERRORS:
            break
    if not lines and not errors:
        errors.append(_error("empty_file", "The input file holds no requests.", None))
    return lines, errors


def _check(raw: bytes, endpoint: str, seen: set[str]) -> tuple[str, str] | dict[str, Any]:
    """(custom id, body) of a line, or its error."""
    try:
        data = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _error("invalid_json_line", "This line is not parseable as valid JSON.")
    if not isinstance(data, dict):
        return _error("invalid_json_line", "This line is not a JSON object.")
    for key in KEYS:
        if key not in data:
            return _error("missing_required_parameter", f"This line has no {key}.", param=key)
    for key in data:
        if key not in KEYS:
            return _error("unknown_parameter", f"A line has {', '.join(KEYS)} and nothing else.", param=str(key)[:80])
    custom_id, body = data["custom_id"], data["body"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512 or not _is_text(custom_id):
        return _error("invalid_custom_id", "custom_id must be a text of 1 to 512 characters.", param="custom_id")
    if custom_id in seen:
        return _error("duplicate_custom_id", "The custom_id of this line is that of another one.", param="custom_id")
    if data["method"] != "POST":
        return _error("invalid_method", "The method must be POST.", param="method")
    if data["url"] != endpoint:
        return _error("mismatched_endpoint", f"The url must be the batch's endpoint, {endpoint}.", param="url")
    if not isinstance(body, dict):
        return _error("invalid_body", "The body must be a JSON object.", param="body")
    if body.get("stream"):
        return _error("invalid_body", "Requests in a batch are not streamed.", param="body.stream")
    return custom_id, json.dumps(body)


def _error(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}


def _is_text(value: str) -> bool:
    """Whether it can be written; half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
