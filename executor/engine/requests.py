"""What a client holds of its request: a stream of tokens, thread-safe, and the record of its times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from qllm.executor.errors import ExecutorError


class Tokenizer(Protocol):
    """What the engine needs of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Token(NamedTuple):
    """One generated token. `text`: what it adds to the output so far (may be empty inside a character); None where
    the engine has no tokenizer."""

    id: int
    text: str | None


@dataclass(frozen=True)
class Record:
    """Times of one request in seconds on the engine's clock, nan where it never came to that.

    queueing + running + suspended = finish - arrival. `preemptions`: how often a pass that it was in was suspended;
    `evictions`: how often its KV had to give way.
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


@dataclass(frozen=True)
class Completion:
    """A request's whole output. `finish_reason`: "stop", "length" or "cancelled"."""

    tokens: list[int]
    text: str | None
    finish_reason: str
    record: Record


@dataclass(frozen=True)
class _End:
    reason: str
    record: Record
    error: ExecutorError | ValueError | None = None


class Stream:
    """The tokens of one request, in order, as they come. One thread iterates; any thread may `cancel()`.

    Iterating ends where the request ends, cancelled ones included. Raises what ended the request where that was an
    error: RequestFailed, EngineClosed, or scheduler.RequestTooLarge.
    """

    def __init__(self, id: int, prompt: list[int], cancel: Callable[[], None], tokenizer: Tokenizer | None):
        self.id = id
        self.prompt = prompt
        self.tokens: list[int] = []  #: ids iterated so far
        self._text = None if tokenizer is None else _Text(tokenizer)
        self._cancel = cancel
        self._queue: SimpleQueue[int | _End] = SimpleQueue()
        self._end: _End | None = None

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        if self._end is None:
            item = self._queue.get()
            if isinstance(item, int):
                self.tokens.append(item)
                return Token(item, None if self._text is None else self._text.add(item))
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def cancel(self) -> None:
        """Take the request out, wherever it stands. Idempotent; returns at once."""
        self._cancel()

    def result(self) -> Completion:
        """Wait for the end and return the whole output. Raises what iterating raises."""
        for _ in self:
            pass
        end = self._end
        if end is None:
            raise RuntimeError("the stream ended without an end")
        text = None if self._text is None else self._text.whole
        return Completion(self.tokens, text, end.reason, end.record)

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "cancelled" or "error"; None before the end was reached by iterating."""
        return None if self._end is None else self._end.reason

    @property
    def record(self) -> Record | None:
        """The request's times; None before the end was reached by iterating."""
        return None if self._end is None else self._end.record

    # The engine's side, called in its thread.

    def put(self, token: int) -> None:
        self._queue.put(token)

    def end(self, reason: str, record: Record, error: ExecutorError | ValueError | None = None) -> None:
        """Nothing comes after this; what comes is not looked at."""
        self._queue.put(_End(reason, record, error))


class _Text:
    """Text from tokens one by one. A token's text depends on its neighbours, so a few are decoded together each time,
    and an unfinished character waits for the token that finishes it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0  # decoded again each time
        self._told = 0  # of the tokens, those whose text was given out
        self.whole = ""

    def add(self, token: int) -> str:
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._told])
        now = self._decode(self._ids[self._prefix :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._prefix, self._told = self._told, len(self._ids)
        new = now[len(before) :]
        self.whole += new
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
