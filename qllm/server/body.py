"""Bodies of requests: read within limits of size and time, taken apart, and checked; mistakes are an ApiError."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from qllm.server.errors import ApiError, gone, unsupported
from qllm.server.protocol import NEUTRAL, known
from qllm.traces.messages import dotted
from qllm.traces.requests.strict_model import explain

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body, of at most that many bytes, which has to arrive within `seconds`."""
    too_long = ApiError(413, f"the body is too long; allowed: {most} bytes", code="body_too_long")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > most:
        raise too_long
    parts: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                length += len(part)
                if length > most:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_too_slow") from None
    except ClientDisconnect:
        raise gone() from None
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """A body as a JSON object."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        told = type(error).__name__ if isinstance(error, UnicodeError | RecursionError) else str(error)[:120]
        raise ApiError(400, f"the body is not valid JSON: {told}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parse(model: type[M], data: dict[str, Any]) -> M:
    """`data` as that model. Fields that are known, and not served, may ask for nothing."""
    given, fields = {}, known(model)
    for name, value in data.items():
        if name not in fields and name in NEUTRAL:
            if not any(type(value) is type(one) and value == one for one in _numbers(NEUTRAL[name])):
                raise unsupported(name, f"; allowed: {json.dumps(NEUTRAL[name][-1])}, or leave it out")
            continue
        if name not in fields:
            raise ApiError(400, f"{name!r:.80}: unknown field", param=name[:80], code="unknown_field")
        given[name] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        key, text = explain(error, given)
        text = text.split(", got ")[0]  # no text of a prompt
        param = dotted(key)[:80] or None
        raise ApiError(400, f"{param}: {text}" if param else text, param=param) from None


def _numbers(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """With the same numbers as floats."""
    return (*values, *(float(value) for value in values if type(value) is int))


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """The part of the API's description that tells of a body."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: dict[str, Any]) -> Any:
    """A schema with its definitions in their places."""
    definitions = schema.pop("$defs", {})

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return place(definitions[value["$ref"].split("/")[-1]])
            return {key: place(item) for key, item in value.items()}
        return [place(item) for item in value] if isinstance(value, list) else value

    return place(schema)
