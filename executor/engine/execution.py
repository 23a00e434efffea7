"""How a pass moves on in time: step by step, from one point where it may stop to the next.

In virtual time the clock moves by what a step model says (`qllm.traces.step_times.cost_model`), as on the simulator's
step-by-step device: same times, same preemption points, same order of events at one instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, cast

import numpy as np
import torch

from qllm.executor.engine.block_manager import BlockManager
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import ExecutorError
from qllm.executor.model.passes import Point, RunningPass
from qllm.executor.sampling.sampling import sample
from qllm.scheduler import Pass, Scheduler
from qllm.traces.step_times.cost_model import PassCost, PassCostModel

STAGES = ("attention", "experts", "head")
ROWS_AT_ONCE = 4  # drawn by a CPU between two points: at a vocabulary of 150,000 up to two milliseconds each


class Execution(Protocol):
    """A pass that has begun, and how it moves on."""

    running: RunningPass
    sequences: tuple[EngineRequest, ...]
    done: int  #: steps done (see `qllm.traces.results.PassSlice`)

    def advance(self) -> bool:
        """Run to the next preemption point; False at the end of the pass. Raises what the pass raises."""

    @property
    def may_stop(self) -> bool:
        """Whether the policy's granularity lets the pass stop where it stands."""

    def place(self) -> tuple[int, str]:
        """(layer, stage) of what comes next."""


def execution_of(p: Pass) -> Execution:
    """The execution of a pass that has begun: its cursor. Raises ExecutorError."""
    if p.cursor is None:
        raise ExecutorError(f"{p!r} has not begun")
    return cast(Execution, p.cursor)  # the scheduler does not look into a cursor, and only the loop sets it


class RealExecution:
    """A pass in real time; its steps are the points that it passed."""

    def __init__(self, running: RunningPass, sequences: tuple[EngineRequest, ...], granularity: str):
        self.running = running
        self.sequences = sequences
        self.done = 0
        self._granularity = granularity

    def advance(self) -> bool:
        self.done += 1
        return self.running.advance() is not None

    @property
    def may_stop(self) -> bool:
        if self._granularity == "layer":
            point = self.running.point
            return point is not None and point.stage == "attention" and point.number == 0
        return self._granularity == "expert"

    def place(self) -> tuple[int, str]:
        point = self.running.point
        if point is not None:
            return point.layer, point.stage
        return (self.running.layer + 1, "head") if self.running.done else (0, "prologue")


class VirtualExecution:
    """A pass in virtual time: it stops at all points of the step model, also at groups of experts without tokens.

    The real pass does not stop there; it follows, and is never ahead of the step model.
    """

    may_stop = True  # at the points of its granularity only

    def __init__(
        self,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        steps: PassCostModel,
        cost: PassCost,
        granularity: str,
        sleep: Callable[[float], None],
    ):
        self.running = running
        self.sequences = sequences
        self.done = 0
        self._steps = steps
        self._cost = cost
        self._sleep = sleep
        self._total = 2 + steps.layers * cost.steps_per_layer
        self._points = frozenset(steps.points(cost, granularity).tolist())

    def advance(self) -> bool:
        while self.done < self._total:
            self._sleep(self._next_step())
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
            return self._group_seconds(index)
        return self._cost.step_s(stage)

    def _group_seconds(self, index: int) -> float:
        """Seconds of a group of experts that begins now: over its own waiting rows and those merged from partners."""
        running, steps = self.running, self._steps
        queues = running.queues  # None where nothing is left of the layer: the real pass has gone on
        own = np.zeros(steps.n_experts, dtype=np.int64) if queues is None else np.array(queues.waiting)
        others = [np.array(q.waiting) for q in running.shared_queues()]
        return float(steps.group_seconds(self._cost, steps.merged(own, others))[index])

    def _follow(self, layer: int, stage: str, number: int) -> None:
        """Bring the real pass to that point, or to the first one after it where there is none."""
        target = (layer, STAGES.index(stage), number)
        while not self.running.done and (self.running.point is None or _order(self.running.point) < target):
            self.running.advance()


def _order(point: Point) -> tuple[int, int, int]:
    return point.layer, STAGES.index(point.stage), point.number


def cost_of(steps: PassCostModel, p: Pass) -> PassCost:
    """How `p`, not launched yet, is split, and its times but for the experts'."""
    return steps.cost(p.prefill, p.n_decode, p.decode_context, p.rows, p.moved_tokens, p.after_prefill)


class MergePartners:
    """The suspended passes that stand before or between the experts of a layer, first launched first: a live view.

    The execution says where a pass stands: in virtual time the real one may be at the experts before its time.
    """

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def __iter__(self) -> Iterator[RunningPass]:
        for p in sorted(self._scheduler.suspended_passes, key=lambda p: p.id):
            execution = execution_of(p)
            if execution.place()[1] == "experts":
                yield execution.running


def entries_of(
    p: Pass, sequences: Mapping[int, EngineRequest], memory: BlockManager
) -> list[tuple[EngineRequest, int]]:
    """Each sequence of `p`, which begins, and how many of its tokens are new; they get KV blocks for these."""
    entries: list[tuple[EngineRequest, int]] = []
    for chunk in p.prefill:
        sequence = sequences[chunk.request.id]
        if not chunk.context:
            sequence.begin()
        if chunk.context < sequence.computed:
            memory.forget(sequence)
        entries.append((sequence, chunk.tokens))
    if p.decode is not None:
        entries += [(sequences[id], 1) for id in p.decode.members]
    for sequence, n in entries:
        memory.grow(sequence, sequence.computed + n, sequences.values())
    return entries


def sampled_by(running: RunningPass) -> list[EngineRequest]:
    """The sequences of which the pass computes the last known token: each gets a next one."""
    return [cast(EngineRequest, entry.seq) for entry in running.sampled]  # the entries of `_begin`


def sample_rows(running: RunningPass, logits: torch.Tensor) -> None:
    """The last part of a pass: draw the next token of each sequence, from logits `[len(running.sampled), vocab]`."""
    sequences = sampled_by(running)
    # An accelerator draws all rows together in less time than a step takes.
    together = logits.device.type != "cpu" or all(s.sampling.temperature == 0 and s.state is None for s in sequences)
    rows = max(1, len(sequences)) if together else ROWS_AT_ONCE
    for first in range(0, len(sequences), rows):
        if not together:
            running.reach("head", first // rows)
        some = sequences[first : first + rows]
        params, seeds, generated, states = zip(*((s.sampling, s.seed, s.generated, s.state) for s in some), strict=True)
        for sequence in some:
            if sequence.state is not None:
                sequence.state.follow(sequence.tokens)
        tokens = sample(logits[first : first + rows], params, generated, seeds, states)
        for sequence, token in zip(some, tokens, strict=True):
            sequence.drawn = token
