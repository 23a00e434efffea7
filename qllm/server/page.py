"""The page at `/`, and the JSON that it asks for. It fetches nothing from anywhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from qllm.server.errors import from_engine

Status = Callable[[float], dict[str, Any]]

#: Paths that need no key: they hold nothing of requests.
PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(status: Status) -> APIRouter:
    """The routes. `status` tells what the page shows since a moment, in seconds of the epoch; it may wait."""
    router = APIRouter()
    for path, (name, kind) in PAGE.items():
        router.add_api_route(path, _file(name, kind), include_in_schema=False)

    @router.get("/status")
    async def now(after: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(status, after)
        except Exception as error:
            raise from_engine(error) from error

    return router


def _file(name: str, kind: str) -> Callable[[], Any]:
    content = files("qllm.server").joinpath("static", name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return send
