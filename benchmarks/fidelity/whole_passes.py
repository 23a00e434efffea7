"""Whole passes against the sum of their steps."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch

from qllm.executor.calibration.grid import mixed_lengths
from qllm.executor.calibration.stopwatch import Entries, fill_cache, random_entries, runs_before, sample_greedily
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split
from qllm.traces.step_times.cost_model import PassCost, PassCostModel

#: (new tokens, tokens cached before) of each sequence of a pass
Mix = list[tuple[int, int]]


@dataclass(frozen=True)
class Checked:
    """One kind of pass: measured (mean) and predicted seconds."""

    mix: Mix
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class RunPass:
    """One kind of pass that was run. seconds: mean; cost: how it was cut; routing: tokens per expert of each time,
    int[layers, experts]."""

    mix: Mix
    seconds: float
    cost: PassCost
    routing: list[np.ndarray]


def run_passes(
    runner: Runner, steps: PassCostModel, mixes: list[Mix], repeats: int = 5
) -> Generator[None, None, list[RunPass]]:
    """Run each mix uninterrupted, cut as `steps` cuts it; yields after each pass and returns them all. Between two
    passes the model may be used for something else. Measured from the batch to the sampled tokens; nothing is read
    inside the pass. Before each runs one that may run before it in serving
    (`qllm.executor.calibration.stopwatch.runs_before`)."""
    times: list[list[float]] = [[] for _ in mixes]
    routing: list[list[np.ndarray]] = [[] for _ in mixes]
    shapes = [cost_of_mix(steps, mix) for mix in mixes]
    with torch.inference_mode():
        fill_cache(runner)
    for number in range(repeats + 1):  # rounds, so that a disturbance hits one repeat of many; the first warms up
        for at, mix in enumerate(mixes):
            with torch.inference_mode():
                entries = random_entries(runner, mix, (mix, number))
                _once(runner, shapes[at], runs_before(runner, entries))
                seconds, counts = _once(runner, shapes[at], entries)
            if number:
                times[at].append(seconds)
                routing[at].append(counts)
            yield
    means = map(statistics.fmean, times)
    return [RunPass(*found) for found in zip(mixes, means, shapes, routing, strict=True)]


def predict(steps: PassCostModel, passes: list[RunPass]) -> list[float]:
    """Seconds of each pass by `steps`, for the routing and the cut that it had."""
    found = []
    for p in passes:
        cost = cost_of_mix(steps, p.mix, p.cost)
        found.append(statistics.fmean(steps.total(cost, steps.experts_of_pass(cost, one)) for one in p.routing))
    return found


def cost_of_mix(steps: PassCostModel, mix: Mix, cut: PassCost | None = None) -> PassCost:
    """How `steps` cuts a pass over `mix` and what it takes; as many pieces and groups as `cut` has, where given."""
    prefill = [(None, new, context) for new, context in mix if new > 1]
    decoding = [context for new, context in mix if new == 1]
    cost = steps.cost(prefill, len(decoding), sum(decoding), len(mix))
    if cut is None:
        return cost
    attention = cost.query_block_s * cost.query_blocks / cut.query_blocks
    return dataclasses.replace(
        cost,
        query_block_s=attention,
        query_blocks=cut.query_blocks,
        experts_per_group=cut.experts_per_group,
        n_groups=cut.n_groups,
    )


def _once(runner: Runner, cost: PassCost, entries: Entries) -> tuple[float, np.ndarray]:
    _wait(runner)
    start = time.perf_counter()
    running = runner.begin(entries, Split(cost.experts_per_group, cost.query_blocks))
    run_to_end(running)
    sample_greedily(running)
    _wait(runner)
    return time.perf_counter() - start, np.array(running.routing)


def _wait(runner: Runner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def standard_mixes(max_tokens: int, max_context: int, max_batch: int) -> list[Mix]:
    """Sizes between the measured ones: prompts, chunks over a context, decode batches of mixed lengths, and both."""
    prompts = sorted({max(2, int(max_tokens * share)) for share in (0.02, 0.05, 0.11, 0.22, 0.45, 0.85, 1.0)})
    mixes: list[Mix] = [[(n, 0)] for n in prompts]
    mixes += [[(max(2, int(max_tokens * a)), int(max_context * b))] for a, b in ((0.1, 0.4), (0.3, 0.8), (0.7, 0.3))]
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        batch = max(1, int(max_batch * share))
        mixes += [[(1, length) for length in mixed_lengths(max_context * c, batch)] for c in (0.06, 0.3)]
    few = max(1, max_batch // 3)
    mixes.append([(max(2, max_tokens // 8), 0)] * 3)
    mixes.append([(max(2, max_tokens // 3), 0), *[(1, max_context // 5)] * few])
    return mixes
