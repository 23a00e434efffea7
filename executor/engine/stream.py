"""What a client holds of its request: a stream of tokens, and in the end the whole output and its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isnan
from queue import SimpleQueue
from typing import NamedTuple

from qllm.executor.engine.text import Detokenizer, Tokenizer
from qllm.executor.errors import ExecutorError
from qllm.executor.sampling.logprobs import Logprobs
from qllm.scheduler import Request


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: the token id.
        text: what the token adds to the output so far (may be empty inside a character); None where the engine has no
            tokenizer.
        logprobs: where the request asked for them.
    """

    id: int
    text: str | None
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class RequestTimes:
    """Times of one request in seconds on the engine's clock, nan where it never came to that.

    queueing + running + suspended = finish - arrival.

    Attributes:
        preemptions: how often a pass that the request was in was suspended.
        evictions: how often its KV had to give way.
    """

    arrival: float
    first_launch: float
    first_token: float
    finish: float
    queueing: float
    running: float
    suspended: float
    preemptions: int
    evictions: int

    @classmethod
    def of(cls, r: Request, now: float, spent: tuple[float, float, int]) -> RequestTimes:
        """Those of `r`, which has ended, or ends `now`. `spent`: seconds running and suspended, and preemptions."""
        finish = max(now, r.arrival) if isnan(r.finish) else r.finish
        running, suspended, preemptions = spent
        waited = finish - r.arrival - running - suspended
        times = (r.arrival, r.first_launch, r.first_token, finish, waited, running, suspended)
        return cls(*times, preemptions, r.evictions)


@dataclass(frozen=True)
class Completion:
    """A request's whole output.

    Attributes:
        tokens: the generated token ids.
        text: their text; None where the engine has no tokenizer.
        finish_reason: "stop", "length" or "cancelled".
        times: when what happened to the request.
        logprobs: of each token, where the request asked for them.
    """

    tokens: list[int]
    text: str | None
    finish_reason: str
    times: RequestTimes
    logprobs: list[Logprobs] | None = None


@dataclass(frozen=True)
class _End:
    reason: str
    times: RequestTimes
    error: ExecutorError | ValueError | None = None


class Stream:
    """The tokens of one request, in order, as they come: an iterator of `Token`.

    One thread iterates; any thread may `cancel()`. Iterating ends where the request ends, cancelled ones included.

    Attributes:
        id: the request's number.
        prompt: the prompt's token ids.
        tokens: the token ids iterated so far.

    Raises:
        RequestFailed: while iterating, if the pass that the request was in broke.
        EngineClosed: while iterating, if the engine was closed or broke.
        RequestTooLarge: while iterating, if the request can never fit the KV budget.
    """

    def __init__(self, id: int, prompt: list[int], cancel: Callable[[], None], tokenizer: Tokenizer | None):
        self.id = id
        self.prompt = prompt
        self.tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._text = None if tokenizer is None else Detokenizer(tokenizer)
        self._cancel = cancel
        self._queue: SimpleQueue[tuple[int, bool, Logprobs | None] | _End] = SimpleQueue()
        self._end: _End | None = None

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        if self._end is None:
            item = self._queue.get()
            if isinstance(item, tuple):
                token, last, logprobs = item
                self.tokens.append(token)
                if logprobs is not None:
                    self._logprobs.append(logprobs)
                return Token(token, None if self._text is None else self._text.add(token, last), logprobs)
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def cancel(self) -> None:
        """End the request, wherever it stands. Idempotent; returns at once."""
        self._cancel()

    def result(self) -> Completion:
        """Wait for the end and return the whole output.

        Raises:
            RequestFailed: the pass that the request was in broke.
            EngineClosed: the engine was closed, or broke.
            RequestTooLarge: the request can never fit the KV budget.
        """
        for _ in self:
            pass
        end = self._end
        if end is None:
            raise RuntimeError("the stream ended without an end")
        text = None if self._text is None else self._text.decode(self.tokens)
        return Completion(self.tokens, text, end.reason, end.times, self._logprobs or None)

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "stop", "length", "cancelled" or "error"; None before the end was reached by iterating."""
        return None if self._end is None else self._end.reason

    @property
    def times(self) -> RequestTimes | None:
        """The request's times; None before the end was reached by iterating."""
        return None if self._end is None else self._end.times

    # The engine's side, called in its thread.

    def put(self, token: int, last: bool, logprobs: Logprobs | None = None) -> None:
        """One more token; whether it is the last."""
        self._queue.put((token, last, logprobs))

    def end(self, reason: str, times: RequestTimes, error: ExecutorError | ValueError | None = None) -> None:
        """The end; whatever is put after it is ignored."""
        self._queue.put(_End(reason, times, error))
