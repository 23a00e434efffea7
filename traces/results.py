"""What a run gave, simulated or real: one row a request, the timeline of its passes, and the load."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np


class Status(IntEnum):
    """How a request ended."""

    FINISHED = 0
    REJECTED = 1  #: could never fit the KV budget
    UNFINISHED = 2  #: still in the system when the run stopped, or ended by an error


class PassSlice(NamedTuple):
    """A stretch of time that a pass ran.

    Attributes:
        start: Seconds.
        end: Seconds.
        pass_id: Number of the pass, from 0 in the order of the launches.
        priority: The most urgent priority in the pass.
        prefills: Chunks of prompts in it.
        decodes: Sequences that decode in it.
        tokens: Tokens in it.
        first: Steps done before (see `PassCostModel.times`; on the engine's real clock: preemption points passed).
        last: Steps done after.
        first_layer: Layer where it began.
        layer: Layer where it stopped.
        stage: Stage of that layer which comes next.
        suspended: Whether it was suspended then; else it ended.
        replica: Of several GPUs the one that ran it, from 0.
    """

    start: float
    end: float
    pass_id: int
    priority: int
    prefills: int
    decodes: int
    tokens: int
    first: int
    last: int
    first_layer: int
    layer: int
    stage: str
    suspended: bool
    replica: int = 0


class LoadPoint(NamedTuple):
    """What a GPU holds from a decision of its scheduler, or the arrival of a request, to the next point.

    Numbers of requests are by class, in the order of `LoadRecord`. As of a decision, whoever was sent to the GPU and
    has not ended is waiting, ready, suspended, or in the pass that runs.

    Attributes:
        at: Seconds.
        kv_used: Share of the KV blocks in use, what the pass that begins takes included.
        waiting: Requests that wait for (more of) their prefill, or in host memory.
        ready: Those that could decode and are not in the pass.
        suspended: Those in suspended passes.
        replica: Of several GPUs the one, from 0.
    """

    at: float
    kv_used: float
    waiting: tuple[int, ...]
    ready: tuple[int, ...]
    suspended: tuple[int, ...]
    replica: int = 0


@dataclass
class LoadRecord:
    """What the GPUs of a run held over time.

    Attributes:
        classes: Names of the classes.
        cls: The class of each request, by its place in `classes`.
        sent: When each request came to a GPU, float64[requests], in seconds; nan: never. Until then it waited in front
            of all GPUs, if it had arrived.
        points: In the order of the simulation.
    """

    classes: tuple[str, ...]
    cls: list[int]
    sent: np.ndarray
    points: list[LoadPoint] = field(default_factory=list)


class RequestRecord(Protocol):
    """What `RunResult` keeps of a request, in seconds on the clock of the run; a scheduler's `Request` has it."""

    first_launch: float
    first_token: float
    finish: float
    running_s: float
    suspended_s: float
    preemptions: int
    evictions: int
    cached: int

    @property
    def queueing_s(self) -> float:
        """Seconds from arrival to finish in no pass at all."""


@dataclass
class RunResult:
    """Columns, one element a request in the trace's order; times in seconds, nan where it never came to that.

    queueing + running + suspended = finish - arrival, for finished requests.

    Attributes:
        arrival: When each request arrived.
        first_launch: When the first pass with the request in it started.
        first_token: When it had its first token.
        finish: When it had its last token.
        queueing: How long it was in no pass.
        running: How long a pass with it ran.
        suspended: How long a pass with it was suspended.
        preemptions: How often a pass with it was suspended, int64.
        evictions: How often its KV had to give way, int64.
        status: A `Status`, int8.
        reasons: Why a request was rejected or broke, by index.
        replica: Of several GPUs the one that it was sent to, from 0; -1: to none. None where there is one GPU.
        cached: Tokens of each that a prefix cache had when it was first admitted, int64. None without such a cache.
        makespan: From the start of the trace to the last token.
        passes: How many were launched.
        kv_peak: Largest share of the KV blocks of a GPU that was ever in use.
        slices: When each pass ran, if that was recorded.
        load: What the GPUs held, if that was recorded.
        routing: Of real passes in the order of their launches: tokens per expert, int64[MoE layers, experts].
    """

    arrival: np.ndarray
    first_launch: np.ndarray
    first_token: np.ndarray
    finish: np.ndarray
    queueing: np.ndarray
    running: np.ndarray
    suspended: np.ndarray
    preemptions: np.ndarray
    evictions: np.ndarray
    status: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    replica: np.ndarray | None = None
    cached: np.ndarray | None = None
    makespan: float = 0.0
    passes: int = 0
    kv_peak: float = 0.0
    slices: list[PassSlice] | None = None
    load: LoadRecord | None = None
    routing: list[np.ndarray] | None = None

    @classmethod
    def of(cls, arrival: np.ndarray) -> RunResult:
        """Return the result of a run that begins: no request that arrives at `arrival` (seconds) has been served."""
        n = len(arrival)
        return cls(
            arrival=arrival,
            first_launch=np.full(n, np.nan),
            first_token=np.full(n, np.nan),
            finish=np.full(n, np.nan),
            queueing=np.full(n, np.nan),
            running=np.full(n, np.nan),
            suspended=np.full(n, np.nan),
            preemptions=np.zeros(n, dtype=np.int64),
            evictions=np.zeros(n, dtype=np.int64),
            status=np.full(n, int(Status.UNFINISHED), dtype=np.int8),
        )

    def launched(self, i: int, r: RequestRecord) -> None:
        """Request `i` is still in the system: keep how far it came."""
        self.first_launch[i], self.first_token[i] = r.first_launch, r.first_token

    def finished(self, i: int, r: RequestRecord, origin: float = 0.0) -> None:
        """Request `i` has all its tokens. `origin`: when the trace started, on the clock of `r`."""
        finish = r.finish - origin
        self.first_launch[i] = r.first_launch - origin
        self.first_token[i] = r.first_token - origin
        self.finish[i] = finish
        self.queueing[i], self.running[i], self.suspended[i] = r.queueing_s, r.running_s, r.suspended_s
        self.preemptions[i], self.evictions[i] = r.preemptions, r.evictions
        if self.cached is not None:
            self.cached[i] = r.cached
        self.status[i] = Status.FINISHED
        self.makespan = max(self.makespan, finish)

    def rejected(self, i: int, reason: str) -> None:
        """Request `i` was not served."""
        self.status[i] = Status.REJECTED
        self.reasons[i] = reason
