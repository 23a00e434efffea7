"""For the tests of the engine: a tiny model, and a virtual clock on which something can happen at an exact point."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from qllm.executor.engine.clock import VirtualClock
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.execution import Execution, VirtualExecution
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import RequestFailed
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Batch
from qllm.executor.model.split import Split
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, Pass
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings

LAYERS, EXPERTS = 2, 8
ROOMY = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=100, block_size=4)
Hook = Callable[[Loop, Pass, Execution], None]


def make_model():
    return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=LAYERS))


def step_model(max_step: float = 1e-4) -> PassCostModel:
    return PassCostModel(affine_timings(layers=LAYERS, experts=EXPERTS, top_k=2, host_s=1e-4), max_step=max_step)


def finest(batch: Batch) -> Split:
    """A point before every expert, and as many groups of query blocks as there are rows."""
    return Split(1, max(1, batch.rows))


class WatchedExecution(VirtualExecution):
    """Calls `reached` at each preemption point, in the engine's thread."""

    reached: Callable[[Execution], None]

    def advance(self) -> bool:
        more = super().advance()
        if more:
            self.reached(self)
        return more


class WatchedClock(VirtualClock):
    """Calls `hook` at each preemption point."""

    def __init__(self, steps: PassCostModel, hook: Hook):
        super().__init__(steps)
        self.hook = hook
        self.loop: Loop | None = None

    def execution(self, p: Pass, running, sequences, cost, granularity: str) -> Execution:
        execution = WatchedExecution(running, sequences, self._steps, cost, granularity, self.sleep)
        execution.reached = lambda reached: self.hook(self.loop, p, reached)
        return execution


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
) -> list[EngineRequest]:
    """Serve (prompt, new tokens, priority, arrival) on the virtual clock; the requests, all ended, blocks all back."""
    clock = WatchedClock(step_model(max_step), hook)
    with Engine(model, policy=policy, limits=limits, clock=clock, seed=0) as engine:
        clock.loop = engine._loop
        served = [
            engine.make_request(prompt, new, priority, SamplingParams(), at) for prompt, new, priority, at in requests
        ]
        engine.call(lambda loop: loop.scheduled.extend(served))
        for request in served:
            with suppress(RequestFailed):
                engine.stream_of(request).result()
        stats = engine.stats()
        assert (stats.requests, stats.suspended_passes, stats.host_bytes) == (0, 0, 0)
        assert stats.free_blocks == stats.total_blocks
        assert engine.call(lambda loop: loop.memory.held) == 0
    return served
