"""The routes /v1/files and /v1/batches, as OpenAI's API describes them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message as AsgiMessage

from qllm.server.batches.service import Batches
from qllm.server.batches.store import Conflict, NotFound, Store
from qllm.server.batches.validation import ENDPOINTS
from qllm.server.body import parse, parse_object, read_body, takes
from qllm.server.errors import ApiError
from qllm.server.protocol import Message

T = TypeVar("T")

MOST_BYTES = 64 << 10  # of the request for a batch
MOST_SECONDS = 30.0  # in which it arrives
UPLOAD_SECONDS = 600  # in which a file arrives
WINDOW = re.compile(r"([1-9]\d{0,3})([mhd])")
SECONDS = {"m": 60, "h": 3600, "d": 86400}
FIELDS = ("file", "purpose")
#: What /openapi.json tells of a file that is answered.
OCTETS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
#: And of an upload.
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                }
            }
        },
    }
}


class NewBatch(Message):
    """What a client says of a new batch."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: str
    completion_window: str
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None


def batch_routes(batches: Batches) -> APIRouter:
    """The routes over these batches; they raise ApiError."""
    router = APIRouter(prefix="/v1")
    store, now = batches.store, batches.now

    @router.post("/files", openapi_extra=UPLOAD)
    async def upload(request: Request) -> dict[str, Any]:
        name, content = await _read_upload(request, batches.settings.max_file_bytes)
        return await store.call(Store.add_file, name, content, now())

    @router.get("/files")
    async def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        found = store.call(Store.files, after, limit, purpose, order == "asc")
        return _page(*await _answered(found, "file"))

    @router.get("/files/{id}")
    async def retrieve_file(id: str) -> dict[str, Any]:
        return await _answered(store.call(Store.file, id), "file")

    @router.get("/files/{id}/content", response_class=Response, responses=OCTETS)
    async def content(id: str) -> Response:
        found = await _answered(store.call(Store.content, id), "file")
        return Response(found, media_type="application/octet-stream")

    @router.delete("/files/{id}")
    async def delete_file(id: str) -> dict[str, Any]:
        await _answered(store.call(Store.delete_file, id), "file")
        return {"id": id, "object": "file", "deleted": True}

    @router.post("/batches", openapi_extra=takes(NewBatch))
    async def create(request: Request) -> dict[str, Any]:
        asked = parse(NewBatch, parse_object(await read_body(request, MOST_BYTES, MOST_SECONDS)))
        if asked.endpoint not in ENDPOINTS:
            told = f"endpoint: must be one of {', '.join(ENDPOINTS)}"
            raise ApiError(400, told, param="endpoint", code="invalid_endpoint")
        window = WINDOW.fullmatch(asked.completion_window)
        if window is None:
            told = "completion_window: must be a whole number of m, h or d, such as 24h"
            raise ApiError(400, told, param="completion_window", code="invalid_completion_window")
        given = asked.completion_window, float(int(window[1]) * SECONDS[window[2]]), asked.metadata
        making = store.call(Store.create, asked.endpoint, asked.input_file_id, now(), *given)
        batch = await _answered(making, "file", "input_file_id")
        batches.notify()
        return batch

    @router.get("/batches")
    async def list_batches(after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        return _page(*await _answered(store.call(Store.batches, after, limit), "batch"))

    @router.get("/batches/{id}")
    async def retrieve(id: str) -> dict[str, Any]:
        return await _answered(store.call(Store.batch, id), "batch")

    @router.post("/batches/{id}/cancel")
    async def cancel(id: str) -> dict[str, Any]:
        batch = await _answered(store.call(Store.cancel, id, now()), "batch")
        batches.notify()
        return batch

    return router


async def _answered(asked: Awaitable[T], what: str, param: str = "id") -> T:
    """What the store says; where there is no such thing, or it cannot be done now, an ApiError."""
    try:
        return await asked
    except NotFound as error:
        status = 404 if param == "id" else 400
        raise ApiError(status, f"there is no {what} {str(error)!r:.80}", param=param, code="not_found") from None
    except Conflict as error:
        raise ApiError(409, str(error), code="conflict") from None


def _page(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": more}


async def _read_upload(request: Request, most: int) -> tuple[str, bytes]:
    """(file name, content) of an upload of at most that many bytes."""
    too_long = ApiError(413, f"the file is too long; allowed: {most} bytes", param="file", code="file_too_long")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "a file is sent as multipart/form-data", code="invalid_form")
    form = await _read_form(request, most + MOST_BYTES, too_long)
    try:
        for key in form:
            if key not in FIELDS:
                raise ApiError(400, f"{key!r:.80}: unknown field", param=key[:80], code="unknown_field")
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file: is missing", param="file", code="missing_field")
        if form.get("purpose") != "batch":
            raise ApiError(400, "purpose: must be 'batch'", param="purpose", code="invalid_purpose")
        content = await file.read()
    finally:
        await form.close()
    if len(content) > most:
        raise too_long
    name = (file.filename or "file").encode("utf-8", "replace").decode("utf-8")
    return name[:255], content


async def _read_form(request: Request, most: int, too_long: ApiError) -> FormData:
    """The fields of a form; a file in it lies on disk where it is large."""
    left = most

    async def receive() -> AsgiMessage:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise too_long
        return message

    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            return await Request(request.scope, receive).form(max_files=1, max_fields=8, max_part_size=MOST_BYTES)
    except TimeoutError:
        raise ApiError(408, f"the file did not arrive within {UPLOAD_SECONDS} s", code="body_too_slow") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail!s:.120}", code="invalid_form") from None
