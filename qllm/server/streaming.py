"""Tokens from the engine's thread to asyncio: pieces of text, one answer or several at once, and their end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from qllm.executor import Completion, Stats, Stream, Token
from qllm.server.admission import Ticket
from qllm.server.errors import ApiError, from_engine

T = TypeVar("T")


class Meter(Protocol):
    """What is told of each request of the engine; qllm.server.metrics counts it."""

    def began(self, class_: str) -> None: ...

    def token(self, class_: str, seconds_since_last: float) -> None: ...

    def ended(self, class_: str, outcome: Completion | Exception) -> None: ...

    def scrape(self, stats: Stats) -> bytes: ...


@dataclass(slots=True)
class Piece:
    """What one token, or the end, adds to an answer."""

    index: int  #: of the answer
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None  #: "stop" or "length", with the last piece


class StopStrings:
    """Text on its way to a client, which ends before the first of some strings."""

    def __init__(self, stops: Sequence[str], include: bool):
        self._stops = stops
        self._include = include
        self._held = ""  # may be the beginning of a stop string

    def add(self, text: str, may_stop: bool) -> tuple[str, bool]:
        """What can be shown now that `text` follows, and whether a stop string ended it."""
        if not self._stops or not text:
            return text, False
        text, self._held = self._held + text, ""
        if may_stop:
            places = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
            if places:
                at, stop = min(places)
                return text[: at + (len(stop) if self._include else 0)], True
        held = max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """How many characters at the end of `text` begin `stop`."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

    def rest(self) -> str:
        """What was held, once no more text comes."""
        text, self._held = self._held, ""
        return text


async def tokens_of(stream: Stream) -> AsyncIterator[Token]:
    """The stream's tokens. A thread waits for them, so that neither the engine nor asyncio does."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Token | Exception | None] = asyncio.Queue()

    def pump() -> None:
        end: Exception | None = None
        try:
            for token in stream:
                loop.call_soon_threadsafe(queue.put_nowait, token)
        except Exception as error:
            end = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, end)

    threading.Thread(target=pump, name="qllm-stream", daemon=True).start()
    while (item := await queue.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


class Choice:
    """One answer under way: a request of the engine, its place in the queue, and its text."""

    def __init__(self, index: int, stream: Stream, ticket: Ticket, stops: StopStrings, min_tokens: int, meter: Meter):
        self.index = index
        self.tokens = 0  #: so far
        self.error: Exception | None = None  #: why the server ended it, if it did
        self._stream = stream
        self._ticket = ticket
        self._stops = stops
        self._min_tokens = min_tokens
        self._meter = meter
        self._ended = False
        meter.began(ticket.class_)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its text as it comes; raises what ended it."""
        last = time.perf_counter()
        try:
            async for token in tokens_of(self._stream):
                now = time.perf_counter()
                self._ticket.started()
                self._meter.token(self._ticket.class_, now - last)
                last = now
                self.tokens += 1
                text, stopped = self._stops.add(token.text or "", self.tokens >= self._min_tokens)
                if stopped:
                    self.close()
                    yield Piece(self.index, text, [token], "stop")
                    return
                yield Piece(self.index, text, [token])
            if self._stream.finish_reason == "cancelled":
                raise self.error or ApiError(499, "the request was cancelled")
            self._end(self._stream.result())
            yield Piece(self.index, self._stops.rest(), finish=self._stream.finish_reason)
        except Exception as error:
            self._end(error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Take the request out of the engine, wherever it stands. Idempotent."""
        if not self._ended:
            self._stream.cancel()
            self._end(ApiError(499, "the client went away"))

    def stop(self, error: ApiError) -> None:
        """End the request with that error, by the server's will."""
        self.error = error
        self._stream.cancel()

    def _end(self, outcome: Completion | Exception) -> None:
        if not self._ended:
            self._ended = True
            self._ticket.left()
            self._meter.ended(self._ticket.class_, outcome)


class Generation:
    """All answers to one HTTP request."""

    def __init__(self, choices: list[Choice], prompt_tokens: int):
        self.choices = choices
        self.prompt_tokens = prompt_tokens

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return sum(choice.tokens for choice in self.choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers as they come; raises ApiError. Closed at the end, however that comes."""
        try:
            if len(self.choices) == 1:
                async for piece in self.choices[0].pieces():
                    yield piece
            else:
                async for piece in self._merged():
                    yield piece
        except Exception as error:
            raise from_engine(error) from error
        finally:
            self.close()

    async def _merged(self) -> AsyncIterator[Piece]:
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(len(self.choices))

        async def feed(choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
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

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(499, "the client went away")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
