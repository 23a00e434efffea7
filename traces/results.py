"""What a run gave, simulated or real: one row a request, and the timeline of its passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Status(IntEnum):
    """How a request ended."""

    FINISHED = 0
    REJECTED = 1  #: could never fit the KV budget
    UNFINISHED = 2  #: still in the system when the run stopped, or ended by an error


class PassSlice(NamedTuple):
    """A stretch of time (seconds) that a pass ran. `first` and `last`: steps done before and after (see
    `PassCostModel.times`; on the engine's real clock: preemption points passed); `layer`: where it stopped; `priority`:
    most urgent priority in it."""

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


@dataclass
class RunResult:
    """Columns, one element a request in the trace's order; times in seconds, nan where it never came to that.

    queueing + running + suspended = finish - arrival, for finished requests.
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
    reasons: dict[int, str] = field(default_factory=dict)  #: why a request was rejected or broke, by index
    makespan: float = 0.0  #: seconds from the trace's start to the last token
    passes: int = 0
    slices: list[PassSlice] | None = None
    routing: list[np.ndarray] | None = None  #: real passes: int64[MoE layers, experts] tokens, in launch order
