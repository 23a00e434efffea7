"""Whole passes against the sum of their steps.

    python benchmarks/fidelity/check_calibration.py FOLDER [--threads 1] [--max-step 0.002] [--repeats 7]

FOLDER: a checkpoint, or a folder with only a config.json; the checkpoint of tools/make_moe.py where it is missing.
Calibrates it, then runs passes at sizes between those that were measured: split as in serving, uninterrupted, each
after one that may run before it in serving. Nothing reads a clock inside a pass. Prints each size and the median of
the absolute errors. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from qllm.executor.calibration.calibrate import Extent, calibrate
from qllm.executor.calibration.grid import mixed_lengths
from qllm.executor.calibration.stopwatch import fill_cache, preceding_pass, random_entries, sample_greedily, seconds_of
from qllm.executor.model.loading import load
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split
from qllm.executor.testing import make_checkpoint
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

BLOCK = 16
#: (new tokens, tokens cached before) of each sequence of a pass
Mix = list[tuple[int, int]]


def standard_mixes(extent: Extent) -> list[Mix]:
    """Prompts, chunks over a context, decode batches of mixed lengths, and both together."""
    tokens, context, most = extent.max_tokens, extent.max_context, extent.max_batch
    prompts = sorted({max(2, int(tokens * share)) for share in (0.02, 0.05, 0.11, 0.22, 0.45, 0.85, 1.0)})
    mixes: list[Mix] = [[(n, 0)] for n in prompts]
    mixes += [[(max(2, int(tokens * a)), int(context * b))] for a, b in ((0.1, 0.4), (0.3, 0.8), (0.7, 0.3))]
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        batch = max(1, int(most * share))
        mixes += [[(1, length) for length in mixed_lengths(context * c, batch)] for c in (0.06, 0.3)]
    mixes.append([(max(2, tokens // 8), 0)] * 3)
    mixes.append([(max(2, tokens // 3), 0), *[(1, context // 5)] * max(1, most // 3)])
    return mixes


def run_mix(runner: Runner, steps: PassCostModel, mix: Mix, number: int) -> tuple[float, float]:
    """(seconds measured, seconds predicted for the same routing) of one pass, from its batch to its sampled tokens."""
    decoding = [context for new, context in mix if new == 1]
    prefill = [(None, new, context) for new, context in mix if new > 1]
    cost = steps.cost(prefill, len(decoding), sum(decoding), len(mix))
    split = Split(cost.experts_per_group, cost.query_blocks)
    entries = random_entries(runner, mix, (mix, number))
    passes = []

    def run(of: list) -> None:
        running = runner.begin(of, split)
        run_to_end(running)
        sample_greedily(running)
        passes.append(running)

    run(preceding_pass(runner, entries))
    seconds = seconds_of(runner.device, lambda: run(entries))
    return seconds, steps.total(cost, steps.experts_of_pass(cost, np.array(passes[-1].routing)))


def without_loop(timings: Timings) -> Timings:
    """Step times without what the engine's loop takes: the passes here run without it."""
    return dataclasses.replace(timings, host_s=timings.host_s - (timings.engine_loop_s or 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-step", type=float, default=0.002)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.folder / "config.json").exists():
        make_checkpoint(args.folder)
    loaded = load(str(args.folder), device=args.device, dtype=args.dtype, random_weights=True)
    extent = Extent(args.max_tokens, args.max_context, args.max_batch)
    mixes = standard_mixes(extent)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        timings = calibrate(loaded, Path(folder) / "timings.csv", extent)
        took = time.perf_counter() - start
    steps = PassCostModel(without_loop(timings), max_step=args.max_step)
    runner = Runner(loaded.model, max(sum(-(-sum(pair) // BLOCK) for pair in mix) for mix in mixes), BLOCK)
    rounds = []
    with torch.inference_mode():
        fill_cache(runner)
        for number in range(args.repeats + 1):  # rounds, so that a disturbance hits one repeat of many
            rounds.append([run_mix(runner, steps, mix, number) for mix in mixes])
    means = np.mean(rounds[1:], axis=0)  # the first warms up
    print(f"{timings.device}; {timings.model}; calibrated in {took:.0f} s")
    print(f"{'sequences':>9} {'new':>6} {'cached':>7} {'measured ms':>12} {'predicted ms':>13} {'error':>7}")
    for mix, (measured, predicted) in zip(mixes, means.tolist(), strict=True):
        new, cached = (sum(column) for column in zip(*mix, strict=True))
        times = f"{1e3 * measured:12.2f} {1e3 * predicted:13.2f} {predicted / measured - 1:+7.1%}"
        print(f"{len(mix):9d} {new:6d} {cached:7d} {times}")
    errors = np.abs(means[:, 1] / means[:, 0] - 1).tolist()
    print(f"median |error| {statistics.median(errors):.1%} over {len(errors)} sizes")


if __name__ == "__main__":
    main()
