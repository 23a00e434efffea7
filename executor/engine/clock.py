"""The engine's clocks: real time, or the virtual time of a step model."""

from __future__ import annotations

import time
from heapq import heappop, heappush
from typing import Protocol

from qllm.executor.engine.execution import Execution, RealExecution, VirtualExecution, cost_of
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.model.passes import RunningPass
from qllm.scheduler import Pass
from qllm.scheduler.pass_times import PassSeconds
from qllm.traces.step_times.cost_model import PassCost, PassCostModel
from qllm.traces.step_times.expected import expected_seconds


class Clock(Protocol):
    """What time it is for an engine, in seconds, and how passes move on in that time."""

    steps: PassCostModel | None  #: splits the passes; None where the engine's own splitter does
    asks_queues: bool  #: whether passes are asked how many rows wait at each expert

    def now(self) -> float:
        """The time now."""

    def idle(self, until: float | None) -> float | None:
        """Nothing to do before `until`, or a message. Returns the seconds to wait for one; None: any time."""

    def suspended(self) -> None:
        """A pass was suspended: adds what that costs beyond its steps."""

    def resumed(self) -> None:
        """A suspended pass goes on: adds what that costs."""

    def execution(
        self,
        p: Pass,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        cost: PassCost | None,
        granularity: str,
    ) -> Execution:
        """How `p`, which begins now, moves on in this clock's time; nothing of it ran yet."""


def predictor(clock: Clock) -> PassSeconds | None:
    """Predicts the seconds of passes for a scheduler that decides by `clock`; None where it learns them by itself."""
    return None if clock.steps is None else expected_seconds(clock.steps)


class Deadlines:
    """When requests have to have ended."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []  # (seconds on the engine's clock, request's number)

    def add(self, at: float, number: int) -> None:
        """That request has until then."""
        heappush(self._heap, (at, number))

    def due(self, clock: Clock) -> list[int]:
        """Numbers of the requests whose time is over, each once."""
        out: list[int] = []
        while self._heap and self._heap[0][0] <= clock.now():
            out.append(heappop(self._heap)[1])
        return out


class RealClock:
    """Real time (`time.monotonic`).

    Args:
        steps: splits the passes, if given; it says nothing about time.
        polls: whether the engine polls for messages while idle instead of sleeping. That keeps a core busy, which then
            need not be woken up nor, in a virtual machine, works for others meanwhile
            (benchmarks/fidelity/idle.py prints what that is worth).
    """

    asks_queues = False

    def __init__(self, steps: PassCostModel | None = None, *, polls: bool = False):
        self.steps = steps
        self._polls = polls

    def now(self) -> float:
        return time.monotonic()

    def idle(self, until: float | None) -> float | None:
        if self._polls:
            time.sleep(0)  # other threads may have the interpreter's lock
            return 0.0
        return None if until is None else max(0.0, until - self.now())

    def suspended(self) -> None:
        pass

    def resumed(self) -> None:
        pass

    def execution(
        self,
        p: Pass,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        cost: PassCost | None,
        granularity: str,
    ) -> Execution:
        return RealExecution(running, sequences, granularity)


class VirtualClock:
    """Time by a step model, from 0 on. Idle time passes at once, and the pass after it wakes the device up.

    Args:
        steps: says what each step takes, and splits the passes.
    """

    asks_queues = True  # groups of experts take time by the rows that wait for them

    def __init__(self, steps: PassCostModel):
        self.steps: PassCostModel | None = steps
        self._steps = steps
        self._now = 0.0
        self._rested = False

    def now(self) -> float:
        return self._now

    def idle(self, until: float | None) -> float | None:
        if until is None:
            return None
        self._rested |= until > self._now
        self._now = max(self._now, until)
        return 0.0

    def suspended(self) -> None:
        self._now += self._steps.suspend_s

    def resumed(self) -> None:
        self._now += self._steps.resume_s

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._now += seconds

    def execution(
        self,
        p: Pass,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        cost: PassCost | None,
        granularity: str,
    ) -> Execution:
        cost = cost or cost_of(self._steps, p)
        if self._rested:
            self._rested = False
            cost.prologue_s += self._steps.wake_s
        return VirtualExecution(running, sequences, self._steps, cost, granularity, self.sleep)
