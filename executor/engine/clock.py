"""The engine's clocks: what time it is, and how a pass moves on in it.

On the real clock a pass takes what it takes. On the virtual clock the same pass runs on the same model, but time is
that of a step model (`qllm.traces.step_times.cost_model`), step by step, as on the simulator's step-by-step device:
same times, same preemption points, same order of events at one instant.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from qllm.executor.model.passes import Point, RunningPass
from qllm.scheduler import Pass
from qllm.traces.step_times.cost_model import PassCost, PassCostModel

STAGES = ("attention", "experts")


class Execution(Protocol):
    """A pass under way. `done`: steps done (see `qllm.traces.results.PassSlice`)."""

    running: RunningPass
    done: int

    def advance(self) -> bool:
        """Run to the next preemption point; False at the end of the pass. Raises what the pass raises."""

    @property
    def may_stop(self) -> bool:
        """Whether the policy's granularity lets the pass stop where it stands."""

    def place(self) -> tuple[int, str]:
        """(layer, stage) of what comes next."""


class Clock(Protocol):
    """Times are seconds. `steps`: what cuts the passes, if anything but the engine's own splitter does."""

    steps: PassCostModel | None

    def now(self) -> float: ...

    def idle(self, until: float | None) -> float | None:
        """Nothing to do before `until` (None: before something is submitted): how long to listen meanwhile."""

    def suspended(self) -> None:
        """A pass was suspended: what that costs beyond its steps."""

    def resumed(self) -> None:
        """A suspended pass goes on: what that costs."""

    def course(self, p: Pass, running: RunningPass, cost: PassCost | None, granularity: str) -> Execution:
        """`p` begins; nothing of it ran yet."""


class RealClock:
    """time.monotonic. `steps`, if given, cut the passes; they say nothing about time.

    polls: do not sleep while idle. It keeps a core busy, which then need not be woken up nor, in a virtual machine,
    works for others meanwhile (benchmarks/fidelity/idle.py prints what that is worth).
    """

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

    def course(self, p: Pass, running: RunningPass, cost: PassCost | None, granularity: str) -> Execution:
        return RealExecution(running, granularity)


class RealExecution:
    """A pass in real time; its steps are the points that it passed."""

    def __init__(self, running: RunningPass, granularity: str):
        self.running = running
        self.done = 0
        self._granularity = granularity

    def advance(self) -> bool:
        self.done += 1
        return self.running.advance() is not None

    @property
    def may_stop(self) -> bool:
        if self._granularity == "layer":
            point = self.running.point
            return point is not None and point.stage == "attention" and point.group == 0
        return self._granularity == "expert"

    def place(self) -> tuple[int, str]:
        point = self.running.point
        if point is not None:
            return point.layer, point.stage
        return (self.running.layer + 1, "head") if self.running.done else (0, "prologue")


class VirtualClock:
    """Time by `steps`, from 0 on. Idle time passes at once, and the pass after it wakes the device up."""

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
        self._now += seconds

    def course(self, p: Pass, running: RunningPass, cost: PassCost | None, granularity: str) -> Execution:
        cost = cost or cost_of(self._steps, p)
        if self._rested:
            self._rested = False
            cost.prologue_s += self._steps.wake_s
        return VirtualExecution(self, running, cost, granularity)


class VirtualExecution:
    """A pass in virtual time. It stops at the step model's points, those of groups without tokens included, where the
    real pass has none; the real pass follows, never ahead of them."""

    def __init__(self, clock: VirtualClock, running: RunningPass, cost: PassCost, granularity: str):
        self.running = running
        self.done = 0
        self.may_stop = True
        self._clock = clock
        self._steps = clock._steps
        self._cost = cost
        self._total = 2 + self._steps.layers * cost.steps_per_layer
        self._points = frozenset(self._steps.points(cost, granularity).tolist())

    def advance(self) -> bool:
        while self.done < self._total:
            self._clock.sleep(self._next_step())
            self.done += 1
            if self.done - 1 in self._points:
                self._follow(*self._steps.position(self._cost, self.done))
                return True
        while not self.running.done:
            self.running.advance()
        return False

    def place(self) -> tuple[int, str]:
        return self._steps.position(self._cost, self.done)[:2]

    def _next_step(self) -> float:
        """Seconds of the step that comes next, as in `PassCostModel.times`."""
        layer, stage, index = self._steps.position(self._cost, self.done)
        if stage == "experts":
            if index == 0:
                self._follow(layer, stage, 0)
            return self._group(layer, index)
        return self._cost.step_s(stage)

    def _group(self, layer: int, index: int) -> float:
        """Seconds of a group of experts that begins now: over what waits there, and what runs along with it."""
        running, steps = self.running, self._steps
        queues = running.queues  # None where nothing is left of the layer: the real pass has gone on
        own = np.zeros(steps.n_experts, dtype=np.int64) if queues is None else np.array(queues.waiting)
        others = [np.array(q.waiting) for q in running.shared_queues()]
        return float(steps.group_seconds(self._cost, steps.merged(own, others))[index])

    def _follow(self, layer: int, stage: str, group: int) -> None:
        """Bring the real pass to that point, or to the first one after it where there is none."""
        target = (layer, STAGES.index(stage), group)
        while not self.running.done and (self.running.point is None or _order(self.running.point) < target):
            self.running.advance()


def _order(point: Point) -> tuple[int, int, int]:
    return point.layer, STAGES.index(point.stage), point.group


def cost_of(steps: PassCostModel, p: Pass) -> PassCost:
    """How `p`, not launched yet, is cut, and its times but for the experts'."""
    return steps.cost(p.prefill, p.n_decode, p.decode_context, p.rows, p.moved_tokens, p.after_prefill)
