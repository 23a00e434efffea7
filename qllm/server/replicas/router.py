"""Knows what each replica has to do, and sends every request where it waits for the least."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager, nullcontext, suppress
from typing import Any, Protocol

from starlette.types import Message

from qllm.server.errors import ApiError, unavailable
from qllm.server.replicas.choice import Report, Sent, ranked
from qllm.server.replicas.relay import Asked
from qllm.server.service import Caller
from qllm.server.settings import ServerSettings
from qllm.server.streaming import Meter, NoMeter
from qllm.server.urgency import Urgencies

FULL = 429  #: the status of a replica that has no room for a request
UNKNOWN = 404  #: that of one that does not have it
REPORT_WITHIN_S = 10.0  #: a replica that says nothing of itself for so long gets no requests until it does
BYTES_PER_TOKEN = 4  #: about, of the body of a request

log = logging.getLogger(__name__)


class ReplicaLost(Exception):
    """The replica that had the request is not there any more, or does not answer."""


class Replica(Protocol):
    """One engine with its application, perhaps in another process. All calls raise ReplicaLost."""

    def ask(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """What its application answers; to close the generator is to go away."""

    async def line(self, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The HTTP status and body that a line of a batch gets."""

    async def report(self) -> Report:
        """What it has to do. It takes its time, so that it can be asked again at once."""

    async def end_all(self) -> None:
        """End what is under way: its clients get an error."""


class Member:
    """A replica as its router sees it.

    Attributes:
        report: the last one; None while it does not serve.
        open: requests that it was sent and that have not ended.
    """

    def __init__(self, name: str, replica: Replica):
        self.name = name
        self.replica = replica
        self.report: Report | None = None
        self.open: set[Sent] = set()

    async def watch(self) -> None:
        """Keep the report fresh until cancelled."""
        while True:
            before = tuple(self.open)
            try:
                async with asyncio.timeout(REPORT_WITHIN_S):
                    report = await self.replica.report()
            except (ReplicaLost, TimeoutError) as error:
                if self.report is not None:
                    log.error("replica %s does not answer: %s", self.name, error or type(error).__name__)
                self.report = None
                await asyncio.sleep(0.1)
                continue
            if self.report is None:
                log.info("replica %s serves", self.name)
            self.report = report
            for sent in before:
                sent.reported = True


class Router:
    """Several replicas as one server. Used by asyncio's thread alone.

    Args:
        settings: of each replica.
        replicas: at least one. They are called 0, 1, ... in this order.

    Attributes:
        members: the replicas by name.
        meter: counts nothing: the replicas count themselves.
    """

    def __init__(self, settings: ServerSettings, replicas: Sequence[Replica]):
        self.settings = settings
        self.meter: Meter = NoMeter()
        self.members = {str(i): Member(str(i), replica) for i, replica in enumerate(replicas)}
        self._urgencies = Urgencies(settings, settings.policy.build())
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- what each replica does ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Follow what the replicas do; called once. It waits a while for those that do not serve yet."""
        for member in self.members.values():
            self._spawn(member.watch())
        with suppress(TimeoutError):
            async with asyncio.timeout(REPORT_WITHIN_S):
                while len(self.serving()) < len(self.members):
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Follow them no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def serving(self) -> list[Member]:
        """The replicas that serve."""
        return [one for one in self.members.values() if one.report is not None and one.report.alive]

    # ---- requests ------------------------------------------------------------------------------------------------

    def priority(self, body: bytes, caller: Caller) -> int:
        """That of the class of a request; of one that will be refused, the default's."""
        settings = self.settings
        usual = settings.classes[settings.default_class].priority
        try:
            data = json.loads(body)
            model, priority, tier = (data.get(name) for name in ("model", "priority", "service_tier"))
            suffix = next(
                (end for end in settings.model_suffixes if isinstance(model, str) and model.endswith(end)), None
            )
            urgency = self._urgencies.resolve(
                priority=priority if type(priority) is int else None,
                tier=tier if isinstance(tier, str) else None,
                suffix=suffix,
                header=caller.class_header,
                key=caller.key,
            )
        except (ApiError, ValueError, RecursionError, AttributeError):  # the replica says what is wrong with it
            return usual
        return settings.classes[urgency.class_].priority

    def candidates(self, priority: int) -> list[Member]:
        """The replicas that may be tried, one after the other. Raises ApiError where there is none."""
        if self._closed:
            raise unavailable("the server is about to end; it takes no more requests", retry_after=5)
        found = {one.name: (one.report, tuple(one.open)) for one in self.serving() if one.report is not None}
        if not found:
            raise unavailable("no replica serves now", retry_after=5)
        return [self.members[name] for name in ranked(found, priority)]

    async def generate(self, asked: Asked, caller: Caller) -> AsyncGenerator[Message, None]:
        """The answer to a request that the model is asked for: where one replica is full, from the next one.

        Raises:
            ApiError: no replica serves, or the one that had the request is lost.
        """
        priority = self.priority(asked.body, caller)
        async with aclosing(self._in_turn(self.candidates(priority), asked, FULL, priority)) as messages:
            async for message in messages:
                yield message

    async def of_one_request(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """The answer of the replica that has the request which `asked` is about; of the last one where none has it.

        Raises:
            ApiError: no replica serves, or one is lost meanwhile.
        """
        serving = self.serving()
        if not serving:
            raise unavailable("no replica serves now", retry_after=5)
        async with aclosing(self._in_turn(serving, asked, UNKNOWN)) as messages:
            async for message in messages:
                yield message

    async def _in_turn(
        self, members: Sequence[Member], asked: Asked, refusal: int, priority: int | None = None
    ) -> AsyncGenerator[Message, None]:
        """The answer of the first of them whose status is not `refusal`, else of the last.

        With a `priority` the request counts as one that a replica has while it is asked.
        """
        for member in members:
            sent = nullcontext() if priority is None else self._sent(member, priority, asked.body)
            with sent:
                async with aclosing(self.ask(member, asked)) as messages:
                    async for message in messages:
                        if message.get("status") == refusal and member is not members[-1]:
                            break
                        yield message
                    else:
                        return

    async def ask(self, member: Member, asked: Asked) -> AsyncGenerator[Message, None]:
        """The answer of one replica. Raises ApiError where it is lost."""
        try:
            async with aclosing(member.replica.ask(asked)) as messages:
                async for message in messages:
                    yield message
        except ReplicaLost as error:
            raise self._lost(member, error) from error

    async def line(self, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The HTTP status and body that a line of a batch gets."""
        priority = self.settings.classes[self.settings.batch_class].priority
        status = 0
        body: dict[str, Any] = {}
        try:
            for member in self.candidates(priority):
                with self._sent(member, priority, json.dumps(data).encode()):
                    try:
                        status, body = await member.replica.line(path, data)
                    except ReplicaLost as error:
                        raise self._lost(member, error) from error
                if status != FULL:
                    break
        except ApiError as error:
            return error.status, error.body()
        return status, body

    def _lost(self, member: Member, error: Exception) -> ApiError:
        log.error("replica %s is lost: %s", member.name, error)
        member.report = None
        # Not tried elsewhere: if the request is what broke the replica, it would break the next one, too.
        return unavailable("the replica that had the request is lost", retry_after=1)

    @contextmanager
    def _sent(self, member: Member, priority: int, body: bytes) -> Iterator[None]:
        sent = Sent(priority, len(body) // BYTES_PER_TOKEN)
        member.open.add(sent)
        try:
            yield
        finally:
            member.open.remove(sent)

    # ---- the end -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """What clients call the model."""
        return next((one.report.name for one in self.serving() if one.report is not None), "")

    @property
    def alive(self) -> bool:
        """Whether a replica serves."""
        return bool(self.serving())

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not any(member.open for member in self.members.values())

    def close_admission(self) -> None:
        """Let nobody in any more; what was accepted goes on."""
        self._closed = True

    def end_all(self) -> None:
        """End what is under way: its clients get an error."""

        async def end(member: Member) -> None:
            with suppress(ReplicaLost):
                await member.replica.end_all()

        for member in self.members.values():
            self._spawn(end(member))
