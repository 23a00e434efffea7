"""What is recorded of the engine's passes, in the terms of the simulator's timeline: of a run, or of the last while."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch

from qllm.executor.engine.execution import execution_of
from qllm.scheduler import Pass, Request, Scheduler, State
from qllm.traces.results import PassSlice


@dataclass
class RunRecorder:
    """Records passes from a moment on."""

    origin: float  #: seconds on the engine's clock at that moment
    passes: int  #: launched until then
    slices: list[PassSlice] = field(default_factory=list)  #: in seconds since `origin`
    #: by pass id, see `RunningPass.kept_routing`
    routing: dict[int, list[list[int]] | torch.Tensor] = field(default_factory=dict)

    def record(
        self,
        p: Pass,
        start: float,
        end: float,
        first: tuple[int, int],
        last: int,
        place: tuple[int, str],
        suspended: bool,
    ) -> None:
        """`p` ran from `first` (steps done, layer) to `last` steps done, and stands at `place` (layer, stage)."""
        self.slices.append(
            PassSlice(
                start=start - self.origin,
                end=end - self.origin,
                pass_id=p.id - self.passes,
                priority=p.priority(),
                prefills=len(p.prefill),
                decodes=p.n_decode,
                tokens=p.tokens,
                first=first[0],
                last=last,
                first_layer=first[1],
                layer=place[0],
                stage=place[1],
                suspended=suspended,
            )
        )

    def counts(self) -> list[np.ndarray]:
        """Tokens per expert of each finished pass, int64[MoE layers, experts], in the order of their launches."""
        return [_counts(self.routing[id]) for id in sorted(self.routing)]


def _counts(kept: list[list[int]] | torch.Tensor) -> np.ndarray:
    if isinstance(kept, torch.Tensor):
        return np.diff(kept.cpu().numpy().astype(np.int64), axis=1, prepend=0)
    return np.array(kept, dtype=np.int64)


class Standing(NamedTuple):
    """Requests of one class.

    Attributes:
        running: in the pass that runs, or between two decode passes.
        waiting: in a prefill queue, or in host memory.
        suspended: in a suspended pass.
        blocks: KV blocks that they hold, wherever they stand.
    """

    running: int = 0
    waiting: int = 0
    suspended: int = 0
    blocks: int = 0


class PassPlace(NamedTuple):
    """Where a pass stands: layer, stage, and whether it is suspended.

    Attributes:
        since: when it came to that, in seconds on the engine's clock.
        held_bytes: of activations that it holds while it is suspended.
    """

    pass_id: int
    class_: str
    prefills: int
    decodes: int
    tokens: int
    layer: int
    stage: str
    suspended: bool
    since: float
    held_bytes: int = 0


@dataclass(frozen=True)
class Activity:
    """What the engine does and did, at one moment; seconds are those of its clock.

    Attributes:
        now: that moment.
        classes: where the requests of each class stand.
        passes: the one that runs, then those that are suspended.
        slices: stretches that passes ran lately, the oldest first.
        preemptions: passes suspended so far, by class and point: "layer" (before a layer), "attention", "experts" or
            "head".
        blocking_s: seconds that requests of a class waited, in no pass, while a less urgent pass ran; their sum.
    """

    now: float
    classes: dict[str, Standing]
    passes: list[PassPlace]
    slices: list[PassSlice]
    preemptions: dict[tuple[str, str], int]
    blocking_s: dict[str, float]


class ActivityRecorder:
    """Keeps the last passes, and counts; used in the engine's thread.

    A pass counts in the class of its most urgent prefill; where it has none, of its most urgent decode.

    Args:
        scheduler: of the engine.
        class_of: the name of a priority's class; there are few of them.
        most: stretches of passes that are kept.
    """

    def __init__(self, scheduler: Scheduler, class_of: Callable[[int], str], most: int = 4096):
        self._scheduler = scheduler
        self._class_of = class_of
        self._slices: deque[PassSlice] = deque(maxlen=most)
        self._preemptions: Counter[tuple[str, str]] = Counter()
        self._blocking_s: dict[str, float] = {}
        self._last = (0.0, 0.0, 0)  # start, end and priority of what ran last
        self._newest = -1  # the newest request that was in the system then
        self._most_urgent = 1 << 62  # the priority of the most urgent request so far

    def record(
        self,
        p: Pass,
        start: float,
        end: float,
        first: tuple[int, int],
        last: int,
        place: tuple[int, str],
        suspended: bool,
    ) -> None:
        """As `RunRecorder.record`, but for the priority."""
        priority = _priority(p)
        size = len(p.prefill), p.n_decode, p.tokens
        steps = first[0], last, first[1]
        self._slices.append(PassSlice(start, end, p.id, priority, *size, *steps, *place, suspended))
        if suspended:
            self._preemptions[self._class_of(priority), _point(p, place[1])] += 1
        requests = self._scheduler.requests
        new = list(takewhile(lambda r: r.id > self._newest, reversed(requests.values())))
        if new:
            self._newest = new[0].id
            self._most_urgent = min(self._most_urgent, *(r.priority for r in new))
            self._count_blocked(new, *self._last)  # who came during the last step of what ran before
        self._last = start, end, priority
        if priority > self._most_urgent:
            self._count_blocked(requests.values(), start, end, priority)

    def _count_blocked(self, requests: Iterable[Request], start: float, end: float, priority: int) -> None:
        """A pass of that priority ran: those of `requests` that are more urgent, and in no pass, waited meanwhile."""
        urgent = [r for r in requests if r.priority < priority and r.arrival < end]
        if urgent:
            held = {r.id for other in self._scheduler.suspended_passes for r in other.requests()}
            for r in urgent:
                if r.id not in held:
                    name = self._class_of(r.priority)
                    self._blocking_s[name] = self._blocking_s.get(name, 0.0) + end - max(start, r.arrival)

    def activity(self, now: float, since: float) -> Activity:
        """What the engine does now, and the stretches that ended after `since`."""
        scheduler = self._scheduler
        passes = [p for p in (scheduler.running, *scheduler.suspended_passes) if p is not None]
        counts: dict[str, Counter[str]] = {}
        in_pass: dict[int, bool] = {}
        for p in passes:
            in_pass |= {r.id: p is not scheduler.running for r in p.requests()}
        for r in scheduler.requests.values():
            count = counts.setdefault(self._class_of(r.priority), Counter())
            count[_standing(r, in_pass.get(r.id))] += 1
            count["blocks"] += _blocks(r, r.id in in_pass)
        return Activity(
            now=now,
            classes={name: Standing(**count) for name, count in counts.items()},
            passes=[self._place(p, p is not scheduler.running) for p in passes if p.cursor is not None],
            slices=[*takewhile(lambda one: one.end > since, reversed(self._slices))][::-1],
            preemptions=dict(self._preemptions),
            blocking_s=dict(self._blocking_s),
        )

    def _place(self, p: Pass, suspended: bool) -> PassPlace:
        size = len(p.prefill), p.n_decode, p.tokens
        since = p.suspended_at if suspended else p.launched
        execution = execution_of(p)
        held = execution.running.held_bytes() if suspended else 0
        return PassPlace(p.id, self._class_of(_priority(p)), *size, *execution.place(), suspended, since, held)


def _standing(r: Request, suspended: bool | None) -> str:
    """The field of `Standing` that counts `r`; `suspended`: whether its pass is, None where it is in none."""
    if suspended is None:
        return "running" if r.state is State.READY else "waiting"
    return "suspended" if suspended else "running"


def _blocks(r: Request, in_pass: bool) -> int:
    """KV blocks that `r` holds; a decode batch keeps the progress of its members, and takes blocks before its pass."""
    batch = r.batch
    if batch is None:
        return r.blocks
    return -(-(r.computed + batch.passes - r.joined + in_pass) // batch.block_size)


def _priority(p: Pass) -> int:
    """That of its most urgent prefill, else of its most urgent decode: urgent ones may decode in anybody's pass."""
    return min(c.request.priority for c in p.prefill) if p.prefill else p.priority()


def _point(p: Pass, stage: str) -> str:
    """Where a pass was suspended."""
    point = execution_of(p).running.point
    return "layer" if stage == "attention" and (point is None or point.number == 0) else stage
