"""What text completions and chat completions have in common: one answer whole, or as server-sent events."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qllm.server.answers.logprobs import TokenTexts
from qllm.server.errors import ApiError
from qllm.server.protocol import Generate
from qllm.server.service import Service
from qllm.server.streaming import DONE, Generation, Piece, event, told_while_connected, while_connected

log = logging.getLogger(__name__)


class Answer:
    """The answer to one HTTP request, which is being generated. Subclasses say what its choices look like.

    Args:
        service: the engine's.
        asked: what the client asked.
        generation: what comes of it.
        request_id: its id.
    """

    prefix = ""  #: of its id
    whole_object = ""  #: OpenAI's `object`
    part_object = ""  #: the same, of a chunk of a stream

    def __init__(self, service: Service, asked: Generate, generation: Generation, request_id: str):
        self._service = service
        self.asked = asked
        self.generation = generation
        self.texts = TokenTexts(service.engine.tokenizer)
        self._id = f"{self.prefix}-{request_id}"
        self._created = int(time.time())
        urgency = generation.urgency
        log.info(
            "%s accepted: class %s, priority %d, %d prompt tokens, %d answers, user %r",
            *(request_id, urgency.class_, urgency.priority, generation.prompt_tokens, len(generation.choices)),
            asked.user if asked.user is None else asked.user[:80],
        )

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice, all its pieces in one."""
        raise NotImplementedError

    def part(self, piece: Piece, before: int | None) -> dict[str, Any]:
        """A choice of a chunk; `before`: characters that came before, None where it is the first of its index."""
        raise NotImplementedError

    def close(self) -> None:
        """Whatever is not generated yet will not be. Idempotent."""
        self._service.ended(self.generation)

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        count = len(self.generation.choices)
        wholes = [Piece(index, "") for index in range(count)]
        try:
            async with aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    whole = wholes[piece.index]
                    whole.text += piece.text
                    whole.tokens += piece.tokens
                    whole.finish = piece.finish
        finally:
            self.close()
        return self._body(self.whole_object, [self.choice(whole) for whole in wholes]) | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. Raises ApiError before the first, and tells of it after."""
        options = self.asked.stream_options
        usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        seen: dict[int, int] = {}  # characters by choice
        try:
            async with aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    body = self._body(self.part_object, [self.part(piece, seen.get(piece.index))])
                    if usage or continuous:
                        body["usage"] = self._usage() if continuous else None
                    seen[piece.index] = seen.get(piece.index, 0) + len(piece.text)
                    yield event(body)
            if usage:
                yield event(self._body(self.part_object, []) | {"usage": self._usage()})
        except ApiError as error:
            if not seen:
                raise
            yield event(error.body())
        finally:
            self.close()
        yield DONE

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}
        return body | {"choices": choices, "service_tier": self.generation.urgency.tier}

    def _usage(self) -> dict[str, int]:
        prompt, generated = self.generation.prompt_tokens, self.generation.tokens
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class EventStream(Response):
    """A response of server-sent events; a client that goes away ends the answer at once.

    Args:
        answer: what is told; closed at the end.
        first: its first event, which has come.
        rest: the events that follow.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, first: bytes, rest: AsyncGenerator[bytes, None]):
        self.status_code = 200
        self.background = None
        self.body = b""
        self._answer, self._first, self._rest = answer, first, rest
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for told in self._rest:
                await send({"type": "http.response.body", "body": told, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await told_while_connected(receive, tell(), self._rest)
        finally:
            self._answer.close()


async def respond(answer: Answer, receive: Receive) -> dict[str, Any] | EventStream:
    """The answer as its client wants it, unless that goes away meanwhile. Raises ApiError."""
    try:
        if not answer.asked.stream:
            return await while_connected(receive, answer.whole())
        events = answer.events()
        first = await while_connected(receive, anext(events))
        return EventStream(answer, first, events)
    except BaseException:
        answer.close()
        raise
