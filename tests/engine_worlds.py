"""For the tests of the engine: a tiny model, and a virtual clock on which something can happen at an exact point."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from qllm.executor.engine.clock import Execution, VirtualClock, VirtualExecution
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.jobs import Job
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.sampling import SamplingParams
from qllm.executor.errors import RequestFailed
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.passes import RunningPass
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, Pass
from qllm.traces.step_times.cost_model import PassCost, PassCostModel
from qllm.traces.step_times.timings import affine_timings

LAYERS, EXPERTS = 2, 8
ROOMY = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=100, block_size=4)
Hook = Callable[[Loop, Pass, Execution], None]


def make_model():
    return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=LAYERS))


def step_model(max_step: float = 1e-4) -> PassCostModel:
    return PassCostModel(affine_timings(layers=LAYERS, experts=EXPERTS, top_k=2, host_s=1e-4), max_step=max_step)


class WatchedCourse(VirtualExecution):
    """Calls `clock.hook` at each preemption point, in the engine's thread."""

    def advance(self) -> bool:
        more = super().advance()
        if more:
            clock = self._clock
            assert isinstance(clock, WatchedClock)
            clock.reached(self)
        return more


class WatchedClock(VirtualClock):
    def __init__(self, steps: PassCostModel, hook: Hook):
        super().__init__(steps)
        self.hook = hook
        self.loop: Loop | None = None
        self.passes: dict[int, Pass] = {}

    def course(self, p: Pass, running: RunningPass, cost: PassCost | None, granularity: str) -> Execution:
        assert cost is not None
        course = WatchedCourse(self, running, cost, granularity)
        self.passes[id(course)] = p
        return course

    def reached(self, course: WatchedCourse) -> None:
        assert self.loop is not None
        self.hook(self.loop, self.passes[id(course)], course)


def prompts(n: int, seed: int, low: int = 3, high: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 96, int(length)).tolist() for length in rng.integers(low, high, n)]


def serve(
    model,
    requests: list[tuple[list[int], int, int, float]],
    *,
    policy="qllm",
    limits: Limits,
    hook: Hook = lambda *_: None,
    max_step: float = 1e-4,
) -> list[Job]:
    """Serve (prompt, new tokens, priority, arrival) on the virtual clock; the jobs, all ended, blocks all back."""
    clock = WatchedClock(step_model(max_step), hook)
    with Engine(model, policy=policy, limits=limits, clock=clock, seed=0) as engine:
        clock.loop = engine._loop
        jobs = [engine.job(prompt, new, priority, SamplingParams(), at) for prompt, new, priority, at in requests]
        engine.call(lambda loop: loop.scheduled.extend(jobs))
        for job in jobs:
            with suppress(RequestFailed):
                job.stream.result()
        stats = engine.stats()
        assert (stats.requests, stats.suspended_passes, stats.host_bytes) == (0, 0, 0)
        assert stats.free_blocks == stats.total_blocks
        assert engine.call(lambda loop: loop.memory.held) == 0
    return jobs
