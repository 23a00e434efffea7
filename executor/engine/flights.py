"""Passes under way in the engine, and what of them may run along with another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qllm.executor.engine.clock import Execution
from qllm.executor.engine.jobs import Job
from qllm.executor.errors import ExecutorError
from qllm.executor.model.passes import RunningPass
from qllm.scheduler import Pass, Scheduler


@dataclass(frozen=True)
class Flight:
    """What a pass's cursor holds: how it moves on, and who is in it."""

    course: Execution
    jobs: tuple[Job, ...]

    @property
    def running(self) -> RunningPass:
        return self.course.running


def flight_of(p: Pass) -> Flight:
    """The flight of a pass that began. Raises ExecutorError."""
    if not isinstance(p.cursor, Flight):
        raise ExecutorError(f"{p!r} has no flight")
    return p.cursor


def held_bytes(p: Pass) -> int:
    """Bytes of the activations that the suspended pass `p` holds."""
    return flight_of(p).running.held_bytes()


class MergePartners:
    """The suspended passes that stand before or between the experts of a layer, first launched first.

    A live view: a pass that is discarded meanwhile drops out. The course says where a pass stands, since on the
    virtual clock the real pass may have got to the experts before its time has.
    """

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def __iter__(self) -> Iterator[RunningPass]:
        for p in sorted(self._scheduler.suspended_passes, key=lambda p: p.id):
            course = flight_of(p).course
            if course.place()[1] == "experts":
                yield course.running
