"""Where a simulation and the real engine part: kinds of passes, the time between them, and kinds of steps."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from qllm.executor.calibration.grid import AFTER_TOKENS, mixed_lengths
from qllm.executor.calibration.stopwatch import Stopwatch, fill_cache, measure, random_entries, runs_before, timed
from qllm.executor.model.runner import Runner
from qllm.executor.model.split import Split
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.validation.machine_speed import Call
from qllm.validation.validate import Comparison, after_rest

SAMPLED = 24  # passes measured again, step kind by step kind
REPEATS = 3
BLOCK = 16
PARTS = {
    "lead": "lead and dense_pre",
    "pre": "lead and dense_pre",
    "attention": "attention",
    "post": "dense_post",
    "experts": "experts",
    "tail": "head",
    "sample": "head",
}


def by_pass(runs: list[Comparison]) -> pd.DataFrame:
    """Seconds of the real runs by kind of pass (prefill, decode, mixed) and of the host between passes: measured in
    the run, and predicted for the same passes with the same routing. Columns count, measured_s, predicted_s, error_s;
    largest contributions first."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])

    def add(kind: str, measured: float, predicted: float) -> None:
        row = rows[kind]
        row[0], row[1], row[2] = row[0] + 1, row[1] + measured, row[2] + predicted

    for run in runs:
        slices = run.real.slices or []
        between_s = run.steps.timings.engine_between_s  # part of host_s, and so of each pass's lead
        rested = after_rest(run.real)
        for call, seconds, predicted, _ in run.passes:
            kind = "mixed" if call.chunks and call.n_decode else "prefill" if call.chunks else "decode"
            add(f"{kind} passes", seconds, predicted)
        for before, after in pairwise(slices):
            if after.pass_id not in rested or after.first > 0:
                switched = run.steps.suspend_s * before.suspended + run.steps.resume_s * (after.first > 0)
                kind = "suspending and resuming" if before.suspended or after.first > 0 else "between passes"
                add(kind, after.start - before.end, switched + between_s)
    return _table(rows)


def by_step(runs: list[Comparison], model: PreTrainedModel, kv_blocks: int) -> pd.DataFrame:
    """The same by kind of step: a sample of the real runs' passes measured once more, part by part, against the step
    model. Columns as in `by_pass`."""
    calls = [(run.steps, call) for run in runs for call in run.calls]
    chosen = [calls[int(at)] for at in np.linspace(0, len(calls) - 1, min(SAMPLED, len(calls)))]
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    runner = Runner(model, kv_blocks, BLOCK)
    with torch.inference_mode(), timed(model) as watch:
        fill_cache(runner)
        for steps, call in chosen:
            measured, counts = _again(runner, watch, call)
            for kind, seconds in _predicted(steps, call, counts).items():
                row = rows[kind]
                row[0], row[1], row[2] = row[0] + 1, row[1] + measured.get(kind, 0.0), row[2] + seconds
    return _table(rows)


def _again(runner: Runner, watch: Stopwatch, call: Call) -> tuple[dict[str, float], np.ndarray]:
    """(seconds by kind of step, medians; tokens per expert) of a pass like `call`: random tokens, decoding sequences
    of lengths around the mean."""
    most = None if runner.max_positions is None else runner.max_positions - 1
    decoding = mixed_lengths(call.decode_context / max(call.n_decode, 1), call.n_decode, most)
    sizes = [*call.chunks, *((1, length) for length in decoding)]
    entries = random_entries(runner, sizes, 0)
    runner.splitter = lambda _: Split(call.cost.experts_per_group, call.cost.query_blocks)
    before = runs_before(runner, entries, AFTER_TOKENS if call.after_prefill else 0)
    passes = [(measure(runner, watch, before), measure(runner, watch, entries))[1] for _ in range(REPEATS + 1)][1:]
    names = [name for name, _ in passes[0].parts]
    medians = np.median([[seconds for _, seconds in p.parts] for p in passes], axis=0)
    found: dict[str, float] = defaultdict(float)
    for name, seconds in zip(names, medians.tolist(), strict=True):
        found[PARTS[name]] += seconds
    return found, np.array(passes[0].routing)


def _predicted(steps: PassCostModel, call: Call, counts: np.ndarray) -> dict[str, float]:
    cost, layers = call.cost, steps.layers
    return {
        "lead and dense_pre": cost.prologue_s + layers * cost.pre_s,
        "attention": layers * cost.query_block_s * cost.query_blocks,
        "dense_post": layers * cost.post_s,
        "experts": layers * cost.experts_base_s + steps.experts_of_pass(cost, counts),
        "head": cost.head_s,
    }


def _table(rows: dict[str, list[float]]) -> pd.DataFrame:
    table = pd.DataFrame(
        [(kind, int(count), measured, predicted) for kind, (count, measured, predicted) in rows.items()],
        columns=["kind", "count", "measured_s", "predicted_s"],
    )
    table["error_s"] = table["predicted_s"] - table["measured_s"]
    table["share"] = table["error_s"] / max(table["measured_s"].sum(), 1e-12)  # of all measured time
    return table.sort_values("error_s", key=abs, ascending=False, ignore_index=True)
