"""Tokens from the engine's thread to asyncio: pieces of text, one answer or several at once, and their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from qllm.executor import Completion, Stats, Stream, Token
from qllm.server.admission import Ticket
from qllm.server.errors import ApiError, from_engine, gone
from qllm.server.urgency import Urgency

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"  #: the last of server-sent events


class Watch(Protocol):
    """Follows one request of the engine."""

    def token(self) -> None:
        """It has one more token."""

    def ended(self, outcome: Completion | Exception | str) -> None:
        """It ended, by itself or for the reason that the server had; called once."""


class Meter(Protocol):
    """What is told of requests; qllm.server.metrics counts them."""

    def began(self, class_: str, prompt_tokens: int) -> Watch:
        """A request was given to the engine; what is returned follows it."""

    def rejected(self, reason: str, class_: str = "") -> None:
        """An HTTP request was refused, with an error of that code."""

    def scrape(self, stats: Stats) -> bytes:
        """All that was counted, for Prometheus. It waits for the engine."""


class NoMeter:
    """Counts nothing."""

    def began(self, class_: str, prompt_tokens: int) -> NoMeter:
        """A request was given to the engine."""
        return self

    def token(self) -> None:
        """It has one more token."""

    def ended(self, outcome: Completion | Exception | str) -> None:
        """It ended."""

    def rejected(self, reason: str, class_: str = "") -> None:
        """An HTTP request was refused."""

    def scrape(self, stats: Stats) -> bytes:
        """Nothing."""
        return b""


@dataclass(slots=True)
class Piece:
    """What one token, or the end, adds to an answer."""

    index: int  #: of the answer
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None  #: "stop" or "length", with the last piece


class Choice:
    """One answer under way: a request of the engine, its place in the queue, and its text."""

    def __init__(self, index: int, stream: Stream, ticket: Ticket, meter: Meter):
        self.index = index
        self.tokens = 0  #: so far
        self.error: Exception | None = None  #: why the server ended it, if it did
        self.stream = stream
        self.ticket = ticket
        self._watch = meter.began(ticket.class_, len(stream.prompt))
        self._ended = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Its text as it comes; raises what ended it."""
        try:
            async for token in self.stream:
                self.ticket.started()
                self._watch.token()
                self.tokens += 1
                yield Piece(self.index, token.text or "", [token])
            reason = self.stream.finish_reason
            if reason == "cancelled":
                raise self.error or gone()
            self._end(self.stream.result())
            if reason == "deadline":
                raise ApiError(504, "the answer took too long", kind="timeout_error", code="deadline")
            yield Piece(self.index, "", finish=reason)
        except Exception as error:
            self._end(error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Take the request out of the engine, wherever it stands. Idempotent."""
        if not self._ended:
            self.stream.cancel()
            self._end(gone())

    def stop(self, error: ApiError) -> None:
        """End the request with that error, by the server's will."""
        self.error = error
        self.stream.cancel()

    def _end(self, outcome: Completion | Exception | str) -> None:
        if not self._ended:
            self._ended = True
            self.ticket.left()
            self._watch.ended(outcome)


class Generation:
    """All answers to one HTTP request."""

    def __init__(self, choices: list[Choice], prompt_tokens: int, urgency: Urgency):
        self.choices = choices
        self.prompt_tokens = prompt_tokens
        self.urgency = urgency  #: in which it is served now

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return sum(choice.tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers as they come; raises ApiError. Closed at the end, however that comes."""
        try:
            source = self.choices[0].pieces() if len(self.choices) == 1 else self._merged()
            async with aclosing(source) as pieces:
                async for piece in pieces:
                    yield piece
        except Exception as error:
            raise from_engine(error) from error
        finally:
            self.close()

    async def _merged(self) -> AsyncGenerator[Piece, None]:
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(len(self.choices))

        async def feed(choice: Choice) -> None:
            try:
                async with aclosing(choice.pieces()) as pieces:
                    async for piece in pieces:
                        await queue.put(piece)
            except Exception as error:
                await queue.put(error)
            await queue.put(None)

        tasks = [asyncio.create_task(feed(choice)) for choice in self.choices]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Take what is left of it out of the engine. Idempotent."""
        for choice in self.choices:
            choice.close()

    def stop(self, error: ApiError) -> None:
        """End it with that error, by the server's will."""
        for choice in self.choices:
            choice.stop(error)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled where the client goes away, which is an ApiError that nobody reads."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise gone()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def told_while_connected(
    receive: Receive, telling: Coroutine[Any, Any, None], rest: AsyncGenerator[Any, None]
) -> None:
    """Have `telling` send what `rest` gives; both end where the client goes away."""
    try:
        await while_connected(receive, telling)
    except (ApiError, OSError):  # the client is gone
        return
    finally:
        await rest.aclose()


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
