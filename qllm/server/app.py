"""The routes of one server, and what surrounds each of them: ids, keys, errors."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from qllm._version import __version__
from qllm.executor import Engine
from qllm.server.answers.answer import Answer, EventStream, respond
from qllm.server.answers.chat import chat, templated
from qllm.server.answers.completions import completion
from qllm.server.answers.priority import change_priority
from qllm.server.batches.routes import batch_routes
from qllm.server.batches.service import Batches
from qllm.server.body import parse, parse_object, read_body, takes
from qllm.server.errors import ERRORS, ApiError, from_engine
from qllm.server.monitor import Monitor
from qllm.server.page import page_routes
from qllm.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, PriorityRequest, TokenizeRequest
from qllm.server.service import Caller, Service
from qllm.server.settings import ApiKey, ServerSettings
from qllm.server.spans import with_spans
from qllm.server.streaming import Meter
from qllm.server.surroundings import Surroundings, refusal_handlers

Starts = Callable[[Service, dict[str, Any], Caller], Awaitable[Answer]]

GENERATE: dict[str, tuple[Starts, type[BaseModel]]] = {
    "/v1/completions": (completion, CompletionRequest),
    "/v1/chat/completions": (chat, ChatRequest),
}
PRIORITY = "/v1/requests/{id:path}/priority"
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, whole or as events", "content": {"text/event-stream": {}}}
}


def make_app(engine: Engine, settings: ServerSettings, *, meter: Meter | None = None) -> FastAPI:
    """The server's application over an engine, which its caller closes.

    Args:
        engine: with a tokenizer, unless all prompts are token ids.
        settings: of the server.
        meter: is told of every request, and makes /metrics; by default `qllm.server.metrics`.

    Returns:
        The application; `app.state.service` is what lies behind its routes.

    Raises:
        ConfigError: the folder of the batches cannot be used, or spans need packages that are missing.
    """
    name = settings.model_name or str(engine.model.config.name_or_path or engine.model.config.model_type)
    monitor = Monitor(engine, settings, name)
    end_spans, counts = None, meter or monitor.metrics
    if settings.spans:
        counts, end_spans = with_spans(counts, name)
    service = Service(engine, settings, name, counts)
    batches = None if settings.batches.folder is None else Batches(settings.batches.folder, settings.batches)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if batches is not None:
            batches.start(lambda path, data: answer(service, path, data))
        yield
        if batches is not None:
            await batches.stop()
        if end_spans is not None:
            await service.in_background(end_spans)
        service.close()

    app = FastAPI(
        title="QLLM",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers=refusal_handlers(),
        responses=ERRORS,
    )
    app.state.service = service
    app.add_middleware(Surroundings, service=service)
    for path, (start, model) in GENERATE.items():
        app.add_api_route(
            path, _generate(service, start), methods=["POST"], openapi_extra=takes(model), responses=EVENTS
        )
    _priority_route(app, service)
    _model_routes(app, service)
    _token_routes(app, service)
    _state_routes(app, service)
    app.include_router(page_routes(monitor.status))
    if batches is not None:
        app.include_router(batch_routes(batches))
    return app


async def answer(service: Service, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body that a line of a batch gets, in the class of batches."""
    key = ApiKey(key="a batch's line", class_name=service.settings.batch_class)
    if path not in GENERATE:
        error = ApiError(
            404, f"url: {path!r:.80} is not served in batches; allowed: {', '.join(GENERATE)}", param="url"
        )
        return error.status, error.body()
    try:
        if data.get("stream"):
            raise ApiError(400, "stream: not supported in a batch", param="stream", code="unsupported_parameter")
        started = await GENERATE[path][0](service, data, Caller(secrets.token_hex(16), key=key))
        return 200, await started.whole()
    except ApiError as error:
        return error.status, error.body()


def _generate(service: Service, start: Starts) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        answer = await start(service, await _body(service, request), request.state.caller)
        found = await respond(answer, request.receive)
        return found if isinstance(found, EventStream) else JSONResponse(found)

    return endpoint


def _priority_route(app: FastAPI, service: Service) -> None:
    @app.post(PRIORITY, openapi_extra=takes(PriorityRequest))
    async def priority(id: str, request: Request) -> dict[str, Any]:
        asked = parse(PriorityRequest, await _body(service, request))
        return await change_priority(service, id, asked, request.state.caller)


def _model_routes(app: FastAPI, service: Service) -> None:
    def entry(name: str) -> dict[str, Any]:
        told = {"id": name, "object": "model", "created": service.started, "owned_by": "qllm"}
        return told | {"root": service.name, "max_model_len": service.max_model_len}

    names = [service.name, *(service.name + suffix for suffix in service.settings.model_suffixes)]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.class_hint(name)
        return entry(name)


def _token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=takes(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await _body(service, request)
        service.check_parts(body.get("messages"))
        asked = parse(TokenizeRequest, body)
        service.class_hint(asked.model)
        tokenizer = service.tokenizer()
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if asked.messages is not None:
            opens = asked.add_generation_prompt is not False
            ids = await templated(service, asked.messages, {"add_generation_prompt": opens})
        else:
            text, special = asked.prompt or "", asked.add_special_tokens is not False
            service.check_text(len(text))
            ids = await service.in_thread(lambda: list(tokenizer.encode(text, add_special_tokens=special)), len(text))
        told: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        if asked.return_token_strs:
            told["token_strs"] = tokenizer.convert_ids_to_tokens(ids)
        return told

    @app.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        asked = parse(DetokenizeRequest, await _body(service, request))
        service.class_hint(asked.model)
        tokenizer = service.tokenizer()
        most = service.engine.vocabulary
        if max(asked.tokens, default=0) >= most:
            raise ApiError(400, f"tokens: allowed are ids from 0 to {most - 1}", param="tokens")
        return {"prompt": await service.in_thread(lambda: tokenizer.decode(asked.tokens), len(asked.tokens))}


def _state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not service.alive:
            return JSONResponse({"status": "the engine does not serve"}, 503)
        if service.admission.closed:
            return JSONResponse({"status": "about to end"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        try:
            text = await service.in_background(lambda: service.meter.scrape(service.engine.stats()))
        except Exception as error:
            raise from_engine(error) from error
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _body(service: Service, request: Request) -> dict[str, Any]:
    settings = service.settings
    return parse_object(await read_body(request, settings.max_body_bytes, settings.body_timeout))
