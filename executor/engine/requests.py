"""A request inside the engine, and what the engine tells its client of it.

Tokens cross to the client in a mailbox. The engine never waits for who reads them, thread or coroutine.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import isnan, nan
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from qllm.executor.engine.text import StopStrings
from qllm.executor.errors import EngineBusy, EngineClosed, ExecutorError, RequestError, RequestFailed, UnusableLogits
from qllm.executor.model.kv_cache import HostKV
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.sampling.logprobs import Logprobs
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import RowState
from qllm.scheduler import Request, State


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: the token id.
        text: what the token adds to the output so far (may be empty inside a character, or where a stop string may have
            begun); None where the engine has no tokenizer.
        logprobs: where the request asked for them.
        time: when the pass that made it ended; seconds on the engine's clock.
    """

    id: int
    text: str | None
    logprobs: Logprobs | None = None
    time: float = nan


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


class End(NamedTuple):
    """How a request ended; `cut`: its text ends before a stop string."""

    reason: str
    times: RequestTimes
    error: ExecutorError | ValueError | None = None
    cut: bool = False


Item = tuple[Token, bool] | End  # a token and whether it is the last


class Bell:
    """Wakes coroutines of one event loop, all that are to be woken by the end of a pass in one go: a call is dear."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = ref(loop)
        self._woken: deque[asyncio.Future[None]] = deque()
        self._rung = False

    def ring(self, future: asyncio.Future[None]) -> None:
        """Wake who awaits `future`; from any thread."""
        self._woken.append(future)
        if not self._rung:  # else `_answer` is still to come, and will find it
            self._rung = True
            loop = self._loop()
            with suppress(RuntimeError):  # the event loop was closed
                if loop is not None:
                    loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False
        while self._woken:
            future = self._woken.popleft()
            if not future.done():
                future.set_result(None)


_bells: WeakKeyDictionary[asyncio.AbstractEventLoop, Bell] = WeakKeyDictionary()


class Mailbox:
    """From the engine's thread to the one thread or coroutine that reads.

    The engine never waits for who reads, so what is not read yet stays here, every token of it: each has an id, a time
    and perhaps log-probabilities that somebody asked for. The request bounds it: at most `max_new_tokens` tokens and
    the end, 256 bytes and its text for a token, 128 for each log-probability reported with it.

    Attributes:
        ended: whether the end was put in.
    """

    def __init__(self) -> None:
        self.ended = False
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._wake: Callable[[], object] | None = None  # of a coroutine that waits; only the reader sets it

    def put(self, item: Item) -> None:
        """Put `item` in; never waits."""
        self.ended |= isinstance(item, End)
        self._items.put(item)
        wake = self._wake  # set before the reader looked whether there is anything, or it has seen the item
        if wake is not None:
            wake()

    def get(self, timeout: float | None = None) -> Item:
        """Wait for the next item. Raises Empty after `timeout` seconds."""
        return self._items.get(timeout=timeout)

    async def aget(self) -> Item:
        """Wait for the next item."""
        loop = asyncio.get_running_loop()
        while True:
            with suppress(Empty):
                return self._items.get_nowait()
            bell = _bells.get(loop) or _bells.setdefault(loop, Bell(loop))
            came: asyncio.Future[None] = loop.create_future()
            self._wake = partial(bell.ring, came)
            try:
                if self._items.empty():
                    await came
            finally:
                self._wake = None


class Desk:
    """The requests of clients that are in the system, by their own ids.

    Clients enter them, and wait for nobody but each other; the engine's thread lets go of them.

    Args:
        max_waiting: how many may wait for their first pass. None: no bound.
    """

    def __init__(self, max_waiting: int | None):
        self.requests: dict[str, EngineRequest] = {}
        self._max_waiting = max_waiting
        self._waiting: set[str] = set()
        self._lock = Lock()  # of those who enter; who leaves takes none
        self._closed = False
        self._empty = Event()  # after it was closed

    def enter(self, sequence: EngineRequest) -> None:
        """Take a request in. Raises RequestError where its id is in use, EngineBusy, EngineClosed."""
        name = sequence.request_id
        with self._lock:
            if self._closed:
                raise EngineClosed(f"request {name}: the engine was closed")
            if name in self.requests:
                raise RequestError(f"request_id is {name!r}; allowed: one that no request in the system has")
            if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
                raise EngineBusy(f"request {name}: {len(self._waiting)} requests wait; allowed: {self._max_waiting}")
            self.requests[name] = sequence
            self._waiting.add(name)

    def begun(self, name: str) -> None:
        """The first pass of that request begins."""
        self._waiting.discard(name)

    def leave(self, name: str) -> None:
        """That request has ended."""
        self._waiting.discard(name)
        self.requests.pop(name, None)
        if self._closed and not self.requests:
            self._empty.set()

    def close(self, seconds: float | None) -> None:
        """Let nobody in any more, and wait until nobody is left, `seconds` at most; None: no bound."""
        with self._lock:
            self._closed = True
        if self.requests:
            self._empty.wait(seconds)


@dataclass(eq=False, kw_only=True)
class EngineRequest(Sequence):
    """One request inside the engine: a sequence, the scheduler's request for it, and the client's mailbox."""

    request: Request
    sampling: SamplingParams
    seed: int  #: of its random numbers
    request_id: str  #: the client's name for it
    desk: Desk | None = None  #: where it was entered
    stop_strings: StopStrings | None = None  #: its text, where strings end it
    deadline: float | None = None  #: seconds on the engine's clock
    mailbox: Mailbox = field(default_factory=Mailbox)
    state: RowState | None = None  #: of its sampling, where its parameters need one
    drawn: int | None = None  #: its next token, where the pass that it is in has drawn one
    text: str | None = None  #: of its last token, where strings may end it
    host: HostKV | None = None  #: its KV while that lies in host memory
    finish_reason: str | None = None  #: why it ended
    error: Exception | None = None  #: what ended it, if an error did

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def dropped(self) -> bool:
        """Whether the scheduler took its KV away, to be recomputed."""
        return bool(self.blocks) and self.request.state is State.WAITING and self.request.computed == 0

    @property
    def logprobs(self) -> Logprobs | None:
        """Those of the token drawn last, where they are wanted."""
        return None if self.state is None else self.state.logprobs

    @property
    def ended(self) -> bool:
        """Whether the client was told of its end."""
        return self.finish_reason is not None

    def begin(self) -> None:
        """Its first pass begins."""
        if self.desk is not None:
            self.desk.begun(self.request_id)

    def take(self) -> tuple[bool, RequestFailed | None]:
        """One more token, the drawn one: whether it ends the request early, and what broke, if anything did."""
        if self.drawn is None:
            broken = None if self.state is None else self.state.error
            unusable = UnusableLogits("its logits hold NaN or infinity, or leave no token to choose")
            return True, self.failure(broken or unusable)
        self.tokens.append(self.drawn)
        stopped = self.drawn in self.sampling.stop
        if self.stop_strings is None:
            return stopped, None
        try:
            self.text = self.stop_strings.add(self.drawn, stopped or self.generated == self.request.max_tokens)
        except Exception as error:
            return True, self.failure(error, "its text: ")
        return stopped or self.stop_strings.found, None

    def tell(self, last: bool, now: float) -> None:
        """Hand the client the token that was taken last."""
        if not self.ended:
            self.mailbox.put((Token(self.tokens[-1], self.text, self.logprobs, now), last))

    def end(self, reason: str, times: RequestTimes, error: ExecutorError | ValueError | None = None) -> None:
        """Tell the client, once."""
        if not self.ended:
            self.finish_reason = reason
            self.error = error
            if self.desk is not None:
                self.desk.leave(self.request_id)
            self.mailbox.put(End(reason, times, error, self.stop_strings is not None and self.stop_strings.found))

    def failure(self, error: Exception, what: str = "") -> RequestFailed:
        """What the client is told where `error` ends the request; `what` says what broke."""
        traceback.clear_frames(error.__traceback__)  # they hold the pass's activations
        failure = RequestFailed(f"request {self.request_id}: {what}{type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
