"""What the engine takes for a pass beyond the pass itself.

That is the loop: its decisions, the messages at each preemption point, the end of one pass and the start of the next.
And it is what a pass takes longer after a pause.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from qllm.executor.calibration.stopwatch import random_entries
from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.engine import Engine
from qllm.executor.engine.execution import Execution, RealExecution
from qllm.executor.engine.replay import replay
from qllm.executor.engine.requests import EngineRequest
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.info import embedding
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import run_to_end
from qllm.executor.model.split import whole
from qllm.scheduler import Limits, Pass
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCost

PROMPT, OUTPUT, BLOCK = 8, 24, 16
PAUSES = 24
PAUSE_S = 0.4
WAKE_PROMPT = 32  # enough to reach most experts: what a pause costs is mostly weights that left the caches


class LoopSeconds(NamedTuple):
    """Seconds a pass: of the whole loop, and of its part between two passes."""

    all: float
    between: float


class _TimedClock(RealClock):
    """Real time; keeps how each pass moved on."""

    def __init__(self) -> None:
        super().__init__()
        self.executions: list[_TimedExecution] = []

    def execution(
        self,
        p: Pass,
        running: RunningPass,
        sequences: tuple[EngineRequest, ...],
        cost: PassCost | None,
        granularity: str,
    ) -> Execution:
        self.executions.append(_TimedExecution(running, sequences, granularity))
        return self.executions[-1]


class _TimedExecution(RealExecution):
    """A pass in real time that knows how long it ran, without the loop around it."""

    ran = 0.0  #: seconds inside its steps
    span = 0.0  #: seconds from the begin of its first step to the end of its last
    _began: float | None = None

    def advance(self) -> bool:
        start = time.perf_counter()
        self._began = start if self._began is None else self._began
        goes_on = super().advance()
        end = time.perf_counter()
        self.ran += end - start
        self.span = end - self._began
        return goes_on


def loop_seconds(model: PreTrainedModel, sequences: int) -> LoopSeconds:
    """Medians over the passes of an engine that decodes `sequences` requests together."""
    # From one pass's start to the next's, without what the pass ran, sampling included, and without making its batch,
    # which a pass alone takes too. Between two steps the loop costs an accelerator nothing: it works meanwhile.
    accelerated = model.device.type != "cpu"
    zeros = np.zeros(sequences)
    trace = RequestTrace(zeros, zeros.astype(int) + PROMPT, zeros.astype(int) + OUTPUT, zeros.astype(int), ("all",))
    blocks = sequences * -(-(PROMPT + OUTPUT) // BLOCK) + 1
    limits = Limits(max_seqs=sequences, max_batched_tokens=sequences * PROMPT, kv_blocks=blocks, block_size=BLOCK)
    clock = _TimedClock()
    with Engine(model, limits=limits, clock=clock, **as_served(model)) as engine:
        slices = replay(engine, trace, priorities={"all": 0}).slices or []
    pairs = list(pairwise(slices))
    around = statistics.median(
        after.start - before.start - (execution.span if accelerated else execution.ran)
        for (before, after), execution in zip(pairs, clock.executions[:-1], strict=True)
    )
    between = statistics.median(after.start - before.end for before, after in pairs)
    return LoopSeconds(max(0.0, around - _batch_seconds(model, sequences)), max(0.0, between))


def as_served(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of an engine that runs small passes as an accelerator serves them: replayed, recorded at first use."""
    return {} if model.device.type == "cpu" else {"graphs": "use", "splitter": whole}


def wake_seconds(model: PreTrainedModel) -> float:
    """What a prompt takes longer after a pause than right behind a decoding sequence, in an engine that polls."""
    # Caches were used by others meanwhile, clocks went down. Median over PAUSES pairs of prompts, each after PAUSE_S.
    rng = np.random.default_rng(0)
    vocabulary = embedding(model).num_embeddings
    limits = Limits(
        max_seqs=1, max_batched_tokens=WAKE_PROMPT, kv_blocks=2 * (WAKE_PROMPT // BLOCK + 1), block_size=BLOCK
    )
    found = []
    with Engine(model, policy="fcfs", limits=limits, clock=RealClock(polls=True), **as_served(model)) as engine:
        for _ in range(PAUSES):
            time.sleep(PAUSE_S)
            prompts = rng.integers(vocabulary, size=(2, WAKE_PROMPT)).tolist()
            streams = [engine.submit(prompt, max_new_tokens=2) for prompt in prompts]
            first, second = (stream.result().times for stream in streams)
            found.append((first.first_token - first.arrival) - (second.first_token - first.finish))
    return max(0.0, statistics.median(found))


def _batch_seconds(model: PreTrainedModel, sequences: int) -> float:
    """Median seconds of what the host does for a decode pass before its first step."""
    runner = GraphRunner(model, 1 + 2 * sequences, BLOCK, graphs="use", max_seqs=sequences)
    runner.make_cache()
    found = []
    with torch.inference_mode():
        for number in range(OUTPUT):
            entries = random_entries(runner, [(1, PROMPT + number)] * sequences, number)
            start = time.perf_counter()
            running = runner.begin(entries)
            found.append(time.perf_counter() - start)
            run_to_end(running)
    return statistics.median(found)
