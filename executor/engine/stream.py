"""What a client holds of its request: a stream of tokens, and in the end the whole output and its times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from queue import Empty
from typing import Any, NamedTuple

from qllm.executor.checks import check_seconds
from qllm.executor.engine.requests import End, Item, Mailbox, RequestTimes, Token
from qllm.executor.engine.text import Detokenizer
from qllm.executor.sampling.logprobs import Logprobs


class Usage(NamedTuple):
    """Tokens of one request.

    Attributes:
        prompt_tokens: in the prompt.
        completion_tokens: generated.
    """

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    """A request's whole output.

    Attributes:
        tokens: the generated token ids; those of a stop string that ended the request included.
        text: their text, without a stop string and what comes after it; None where the engine has no tokenizer.
        finish_reason: "stop", "length", "cancelled" or "deadline".
        times: when what happened to the request.
        usage: its numbers of tokens.
        token_times: when each token was made; seconds on the engine's clock.
        logprobs: of each token, where the request asked for them.
        request_id: the request's own id.
    """

    tokens: list[int]
    text: str | None
    finish_reason: str
    times: RequestTimes
    usage: Usage
    token_times: list[float]
    logprobs: list[Logprobs] | None
    request_id: str


class Stream:
    """The tokens of one request, in order, as they come: an iterator of `Token`, for `async for` too.

    One thread or coroutine reads; any may `cancel()`. Iterating ends where the request ends, cancelled ones included.

    A request that nobody waits for is cancelled: where the stream is dropped, an `async for` is left before its end, or
    a coroutine that awaits `aresult()` is cancelled.

    Attributes:
        id: the request's number.
        request_id: its own id: the one given to `submit`, or its number.
        prompt: the prompt's token ids.
        tokens: the token ids read so far.
        token_times: when each of them was made; seconds on the engine's clock.

    Raises:
        RequestFailed: while iterating, if the pass that the request was in broke.
        EngineClosed: while iterating, if the engine was closed or broke.
        RequestTooLarge: while iterating, if the request can never fit the KV budget.
    """

    def __init__(
        self,
        id: int,
        request_id: str,
        prompt: list[int],
        mailbox: Mailbox,
        cancel: Callable[[], None],
        decoder: Detokenizer | None,
    ):
        self.id = id
        self.request_id = request_id
        self.prompt = prompt
        self.tokens: list[int] = []
        self.token_times: list[float] = []
        self._logprobs: list[Logprobs] = []
        self._told: list[str] = []
        self._decoder = decoder
        self._cancel = cancel
        self._mailbox = mailbox
        self._end: End | None = None

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        token = None if self._end else self._take(self._mailbox.get())
        if token is None:
            self._check()
            raise StopIteration
        return token

    def __aiter__(self) -> AsyncIterator[Token]:
        return _Reader(self._next, self._leave)

    async def _next(self) -> Token:
        token = None if self._end else self._take(await self._mailbox.aget())
        if token is None:
            self._check()
            raise StopAsyncIteration
        return token

    def _take(self, item: Item) -> Token | None:
        """The token that has come; None at the end."""
        if isinstance(item, End):
            self._end = item
            return None
        token, last = item
        self.tokens.append(token.id)
        self.token_times.append(token.time)
        if token.logprobs is not None:
            self._logprobs.append(token.logprobs)
        if token.text is None and self._decoder is not None:
            token = token._replace(text=self._decoder.add(token.id, last))
        self._told.append(token.text or "")
        return token

    def _check(self) -> None:
        if self._end is not None and self._end.error is not None:
            raise self._end.error

    def cancel(self) -> None:
        """End the request, wherever it stands. Idempotent; returns at once."""
        self._cancel()

    def _leave(self) -> None:
        if not self._mailbox.ended:
            self._cancel()

    def __del__(self) -> None:
        self._leave()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end and return the whole output.

        Args:
            timeout: seconds to wait at most; None: no bound. The request goes on where they are over.

        Raises:
            TimeoutError: the request has not ended within `timeout`.
            RequestFailed: the pass that the request was in broke.
            EngineClosed: the engine was closed, or broke.
            RequestTooLarge: the request can never fit the KV budget.
        """
        check_seconds("timeout", timeout, zero=True)
        late = None if timeout is None else time.monotonic() + timeout
        while self._end is None:
            try:
                self._take(self._mailbox.get(None if late is None else max(0.0, late - time.monotonic())))
            except Empty:
                raise TimeoutError(f"request {self.request_id}: it has not ended within {timeout} s") from None
        return self._completion(self._end)

    async def aresult(self) -> Completion:
        """Wait for the end and return the whole output; the request is cancelled where the waiting is.

        Raises:
            RequestFailed: the pass that the request was in broke.
            EngineClosed: the engine was closed, or broke.
            RequestTooLarge: the request can never fit the KV budget.
        """
        try:
            while self._end is None:
                self._take(await self._mailbox.aget())
        except asyncio.CancelledError:
            self._leave()
            raise
        return self._completion(self._end)

    def _completion(self, end: End) -> Completion:
        self._check()
        text = None if self._decoder is None else "".join(self._told)
        if self._decoder is not None and not end.cut:
            text = self._decoder.decode(self.tokens)  # with what waited in a request that was cancelled
        made = self.tokens, text, end.reason, end.times, self.usage, self.token_times
        return Completion(*made, self._logprobs or None, self.request_id)

    @property
    def ended(self) -> bool:
        """Whether the request has ended, read to its end or not."""
        return self._mailbox.ended

    @property
    def usage(self) -> Usage:
        """Numbers of tokens: the prompt's, and those read so far."""
        return Usage(len(self.prompt), len(self.tokens))

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, as in `Completion`, or "error"; None before the end was reached by reading."""
        return None if self._end is None else self._end.reason

    @property
    def times(self) -> RequestTimes | None:
        """The request's times; None before the end was reached by reading."""
        return None if self._end is None else self._end.times


class _Reader:
    """What `async for` holds of a stream. It is dropped where the loop is left."""

    def __init__(self, following: Callable[[], Coroutine[Any, Any, Token]], leave: Callable[[], None]):
        self._following = following
        self._leave = leave

    def __aiter__(self) -> _Reader:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Token]:
        return self._following()  # which does not hold the reader: tracebacks keep what coroutines hold

    def __del__(self) -> None:
        self._leave()
