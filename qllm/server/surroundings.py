"""What surrounds every request: its id, the look at its key, and its refusal, which is told and counted in one way."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Protocol

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qllm.server.errors import GONE, ApiError, from_engine, unavailable
from qllm.server.page import PAGE
from qllm.server.service import Caller
from qllm.server.settings import ApiKey, ServerSettings
from qllm.server.streaming import Meter

log = logging.getLogger(__name__)

#: Routes that need no key: they tell nothing about requests.
OPEN = frozenset({"/health", "/version", *PAGE})
REFUSAL = "qllm.refusal"  #: where a request's state holds the error that it is, or was, refused with


def refused(scope: Scope, error: ApiError) -> Response:
    """The answer to a request that is refused; `Surroundings` counts it as it is sent."""
    if error.status == GONE:
        return Nothing()
    scope.setdefault("state", {})[REFUSAL] = error
    return JSONResponse(error.body(), error.status, error.headers())


class Behind(Protocol):
    """What lies behind an application: a Service, or whatever passes requests on to several."""

    settings: ServerSettings
    meter: Meter


class Surroundings:
    """What every request meets first: its id, and the look at its key. Its answer is logged, and holds the id."""

    def __init__(self, app: ASGIApp, service: Behind):
        self._app = app
        self._service = service
        self._keys = {sha256(key.key.encode()).digest(): key for key in service.settings.api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:=+/@-]{1,128}", given, re.ASCII) else secrets.token_hex(16)
        began, status = time.perf_counter(), 0
        state = scope.setdefault("state", {})

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if isinstance(error := state.get(REFUSAL), ApiError):
                    self._service.meter.rejected(error.code or str(status), error.class_)
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            if isinstance(error := state.get(REFUSAL), ApiError):  # whoever holds the connection refuses it
                raise error
            key = self._key(headers, scope["path"])
        except ApiError as error:
            await refused(scope, error)(scope, receive, tell)
        else:
            caller = Caller(request_id, headers.get(self._service.settings.class_header), key)
            state["caller"] = caller
            try:
                await self._app(scope, receive, tell)
            except asyncio.CancelledError:  # the process ends, and waits no longer for the rest of this request
                if status == 0:
                    ended = unavailable("the server ended before the request was complete")
                    await refused(scope, ended)(scope, receive, tell)
                raise
            except Exception as error:
                # Its message is left out: it may hold text of a prompt.
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s internal error: %s\n%s", request_id, type(error).__name__, where)
                if status == 0:
                    await refused(scope, from_engine(error))(scope, receive, tell)
        took = time.perf_counter() - began
        log.info("%s %s %s: %d in %.3f s", request_id, scope["method"], scope["path"][:80].encode(), status, took)

    def _key(self, headers: Headers, path: str) -> ApiKey | None:
        if not self._keys or path in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = sha256(given.strip().encode()).digest()
        found = [key for one, key in self._keys.items() if compare_digest(one, digest)]  # looks at all of them
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401, "the API key is missing or unknown", kind="authentication_error", code="invalid_api_key"
            )
        return found[0]


class Nothing(Response):
    """The answer to a client that is not there any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send nothing."""


def refusal_handlers() -> dict[int | type[Exception], Callable[[Request, Any], Any]]:
    """What an application answers to each kind of error."""

    async def of_ours(request: Request, error: ApiError) -> Response:
        return refused(request.scope, error)

    async def of_the_framework(request: Request, error: StarletteHTTPException) -> Response:
        """No such route, no such method."""
        code = "not_found" if error.status_code == 404 else None
        response = refused(request.scope, ApiError(error.status_code, str(error.detail), code=code))
        response.headers.update(error.headers or {})
        return response

    async def of_a_query(request: Request, error: RequestValidationError) -> Response:
        """A parameter of a query that is not possible."""
        found = error.errors()[0]
        name = str(found["loc"][-1])[:80]
        return refused(request.scope, ApiError(400, f"{name}: {found['msg']}", param=name))

    return {ApiError: of_ours, StarletteHTTPException: of_the_framework, RequestValidationError: of_a_query}
