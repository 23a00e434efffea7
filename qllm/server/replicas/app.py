"""The routes of several replicas behind one address. What they answer comes from `make_app` of each replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from qllm._version import __version__
from qllm.server.app import GENERATE, PRIORITY
from qllm.server.batches.routes import batch_routes
from qllm.server.batches.service import Batches
from qllm.server.body import read_body
from qllm.server.errors import ApiError, unavailable
from qllm.server.replicas.metrics import merged
from qllm.server.replicas.relay import Asked
from qllm.server.replicas.router import Member, Router
from qllm.server.streaming import DONE, event, told_while_connected, while_connected
from qllm.server.surroundings import Surroundings, refusal_handlers

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def make_replicas_app(router: Router) -> FastAPI:
    """The application over a router, which it starts and stops.

    Args:
        router: of the replicas.

    Returns:
        The application; `app.state.service` is the router.

    Raises:
        ConfigError: the folder of the batches cannot be used.
    """
    settings = router.settings
    batches = None if settings.batches.folder is None else Batches(settings.batches.folder, settings.batches)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await router.start()
        if batches is not None:
            batches.start(router.line)
        yield
        if batches is not None:
            await batches.stop()
        await router.stop()

    app = FastAPI(
        title="QLLM",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        exception_handlers=refusal_handlers(),
    )
    app.state.service = router
    app.add_middleware(Surroundings, service=cast(Any, router))
    _state_routes(app, router)
    if batches is not None:
        app.include_router(batch_routes(batches))

    async def generate(request: Request) -> Response:
        asked = await _asked(router, request)
        return await _passed_on(request, router.generate(asked, request.state.caller))

    async def priority(request: Request) -> Response:
        asked = await _asked(router, request)
        return await _passed_on(request, router.of_one_request(asked))

    async def elsewhere(request: Request) -> Response:
        asked = await _asked(router, request)
        return await _passed_on(request, router.ask(_first(router), asked))

    for path in GENERATE:
        app.add_api_route(path, generate, methods=["POST"])
    app.add_api_route(PRIORITY, priority, methods=["POST"])
    app.add_api_route("/{path:path}", elsewhere, methods=METHODS)
    return app


def _state_routes(app: FastAPI, router: Router) -> None:
    @app.get("/health")
    async def health() -> Response:
        states = {one.name: "ok" if one in router.serving() else "does not serve" for one in router.members.values()}
        if router.closed:
            return JSONResponse({"status": "about to end", "replicas": states}, 503)
        if not router.alive:
            return JSONResponse({"status": "no replica serves", "replicas": states}, 503)
        return JSONResponse({"status": "ok", "replicas": states})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        asked = await _asked(router, request)

        async def text(member: Member) -> str:
            async with aclosing(router.ask(member, asked)) as messages:
                parts = [message async for message in messages]
            return b"".join(part.get("body", b"") for part in parts).decode() if parts[0]["status"] == 200 else ""

        serving = router.serving()
        found = await asyncio.gather(*map(text, serving), return_exceptions=True)
        texts = {one.name: told for one, told in zip(serving, found, strict=True) if isinstance(told, str)}
        return Response(merged(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


def _first(router: Router) -> Member:
    """The replica that tells what all of them would."""
    serving = router.serving()
    if not serving:
        raise unavailable("no replica serves now", retry_after=5)
    return serving[0]


async def _asked(router: Router, request: Request) -> Asked:
    """The request as a value; its id goes along."""
    settings = router.settings
    body = await read_body(request, settings.max_body_bytes, settings.body_timeout)
    headers = [(name, value) for name, value in request.headers.raw if name != b"x-request-id"]
    headers.append((b"x-request-id", request.state.caller.request_id.encode()))
    path = request.scope["path"]
    return Asked(request.method, path, request.scope["query_string"], tuple(headers), body)


async def _passed_on(request: Request, messages: AsyncGenerator[Message, None]) -> Response:
    """A response of these messages, the first of which has come. Raises ApiError."""
    try:
        return PassedOn(await while_connected(request.receive, anext(messages)), messages)
    except BaseException:
        await messages.aclose()
        raise


class PassedOn(Response):
    """What a replica answers, as it comes. A client that goes away ends it.

    Args:
        start: the first message, with status and headers.
        rest: the messages that follow.
    """

    def __init__(self, start: Message, rest: AsyncGenerator[Message, None]):
        self.status_code = start["status"]
        self.background = None
        self.body = b""
        # The id of the request is set again by this server.
        self.raw_headers = [pair for pair in start["headers"] if pair[0] != b"x-request-id"]
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for message in self._rest:
                    await send(message)
            except ApiError as error:  # the replica is lost
                if self.headers.get("content-type", "").startswith("text/event-stream"):
                    told = event(error.body()) + DONE
                    await send({"type": "http.response.body", "body": told, "more_body": False})

        await told_while_connected(receive, tell(), self._rest)
