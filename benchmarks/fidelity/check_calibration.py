"""Whole passes against the sum of their steps, measured between the visits of a calibration.

    python benchmarks/fidelity/check_calibration.py FOLDER [--threads 1] [--max-step 0.002] [--repeats 7]

FOLDER: a checkpoint, or a folder with only a config.json (tools/make_moe.py makes one); a missing one is made.
Passes are cut as in serving and run uninterrupted; sizes lie between those that were measured. A first calibration says
how they are cut. Then they run between the visits of a second one, which predicts them: a machine whose speed drifts
drifts for both. Prints each size, the median of the absolute errors, how far the two calibrations lie apart, and how
long they took.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import torch
from make_moe import make

from qllm.executor.calibration.calibrate import Extent, calibrate, calibration
from qllm.executor.calibration.calibration_check import Checked, RunPass, predict, run_passes, standard_mixes
from qllm.executor.calibration.subject import load_subject
from qllm.executor.model.runner import Runner
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings

BLOCK = 16
T = TypeVar("T")


def alternate(
    visits: Generator[object, None, Timings], passes: Generator[None, None, list[RunPass]], share: float
) -> tuple[Timings, list[RunPass], float]:
    """What both return, run in turn, `share` passes to a visit; and the seconds that the visits took."""
    due = took = 0.0
    found: list[RunPass] | None = None
    while True:
        start = time.perf_counter()
        timings = ended(visits)
        took += time.perf_counter() - start
        due += math.inf if timings else share
        while due >= 1 and found is None:
            found, due = ended(passes), due - 1
        if timings and found is not None:
            return timings, found, took


def ended(going: Generator[object, None, T]) -> T | None:
    """Go on by a step; what it returns, if that was its end."""
    try:
        next(going)
    except StopIteration as end:
        result: T = end.value
        return result
    return None


def without_loop(timings: Timings, max_step: float) -> PassCostModel:
    """Steps without what the engine's loop takes: the passes here run without it."""
    return PassCostModel(dataclasses.replace(timings, host_s=timings.host_s - timings.engine_loop_s), max_step=max_step)


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
        make(args.folder)
    subject = load_subject(str(args.folder), device=args.device, dtype=args.dtype)
    extent = Extent(args.max_tokens, args.max_context, args.max_batch)
    mixes = standard_mixes(**vars(extent))
    blocks = max(sum(-(-sum(pair) // BLOCK) for pair in mix) for mix in mixes)
    with tempfile.TemporaryDirectory() as folder:
        start, visits = time.perf_counter(), list[int]()
        first = calibrate(subject, Path(folder) / "first.csv", extent, lambda done, _: visits.append(done))
        took = time.perf_counter() - start
        runner = Runner(subject.model, blocks, BLOCK)
        passes = run_passes(runner, without_loop(first, args.max_step), mixes, args.repeats)
        share = len(mixes) * (args.repeats + 1) / len(visits)
        second, found, again = alternate(calibration(subject, Path(folder) / "second.csv", extent), passes, share)
    apart = [predict(without_loop(t, args.max_step), found) for t in (first, second)]
    checked = [Checked(p.mix, p.seconds, predicted) for p, predicted in zip(found, apart[1], strict=True)]
    print(f"{first.device}; {first.model}; calibrated in {took:.0f} s and {again:.0f} s")
    print(f"{'sequences':>9} {'new':>6} {'cached':>7} {'measured ms':>12} {'predicted ms':>13} {'error':>7}")
    for one in checked:
        new, cached = sum(n for n, _ in one.mix), sum(c for _, c in one.mix)
        times = f"{1e3 * one.measured:12.2f} {1e3 * one.predicted:13.2f} {one.error:+7.1%}"
        print(f"{len(one.mix):9d} {new:6d} {cached:7d} {times}")
    print(f"median |error| {statistics.median(abs(one.error) for one in checked):.1%} over {len(checked)} sizes")
    drift = statistics.median(b / a - 1 for a, b in zip(*apart, strict=True))
    print(f"the second calibration predicts {drift:+.1%} (median) of what the first does")


if __name__ == "__main__":
    main()
