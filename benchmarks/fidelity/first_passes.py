"""What a prefill pays for being the first of its size.

    python benchmarks/fidelity/first_passes.py FOLDER [--threads 1] [--prompts 40] [--rounds 3]

FOLDER: the checkpoint of tools/make_moe.py, made where it is missing. oneDNN makes code for each number of rows,
and keeps it for a limited number of them; the engine's own kernel (executor/cpu/packed_matmul.cpp) knows no sizes. Each
prefill runs twice, and what the first takes over the second is printed, as the sum over all prompts, with the products
of oneDNN and with those of the kernel; and what a prefill that comes again takes with the kernel over oneDNN.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qllm.executor.calibration.stopwatch import random_entries
from qllm.executor.cpu import packed_matmul
from qllm.executor.model.loading import load
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.testing import make_checkpoint

BLOCK, SMALLEST, LARGEST = 16, 256, 1024


def seconds(runner: Runner, entry: tuple[Sequence, int]) -> float:
    """One prefill; the sequence stands afterwards where it stood."""
    start = time.perf_counter()
    run_to_end(runner.begin([entry]))
    took = time.perf_counter() - start
    entry[0].computed = 0
    return took


def of_sizes(runner: Runner, sizes: list[int], seed: str) -> tuple[float, float]:
    """Seconds of prefills of random prompts in all, at first and again."""
    first = again = 0.0
    for number, size in enumerate(sizes):
        entry = random_entries(runner, [(size, 0)], (seed, number))[0]
        first += seconds(runner, entry)
        again += seconds(runner, entry)
    return first, again


def runner_of(folder: Path, kernel: Callable[..., None] | None) -> Runner:
    """The model in `folder`, its products computed by `kernel`, or by oneDNN without one."""
    compiled = packed_matmul.kernel
    packed_matmul.kernel = lambda: kernel  # type: ignore[assignment]
    try:
        return Runner(load(str(folder), dtype="float32").model, LARGEST // BLOCK, BLOCK)
    finally:
        packed_matmul.kernel = compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernel = packed_matmul.kernel()
    if kernel is None:
        parser.error("no compiled kernel here: it needs Linux on x86-64, and a C++ compiler at installation")
    folder, rng = make_checkpoint(args.folder), random.Random(0)
    runners = {"oneDNN": runner_of(folder, None), "the kernel": runner_of(folder, kernel)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    with torch.inference_mode():
        for runner in runners.values():
            of_sizes(runner, [rng.randint(SMALLEST, LARGEST) for _ in range(args.prompts)], "warm")
        for number in range(args.rounds):  # in turn, so that the machine's drift meets all alike
            sizes = [rng.randint(SMALLEST, LARGEST) for _ in range(args.prompts)]
            for name, runner in runners.items():
                found[name].append(of_sizes(runner, sizes, str(number)))
    print(f"prefills of {SMALLEST} to {LARGEST} tokens, first over again (median of {args.rounds} rounds)")
    for name, rounds in found.items():
        print(f"  products by {name}: {statistics.median(a / b for a, b in rounds):.3f}")
    cost = statistics.median(b / a for (_, a), (_, b) in zip(found["oneDNN"], found["the kernel"], strict=True))
    print(f"  again, the kernel over oneDNN: {cost:.3f}")


if __name__ == "__main__":
    main()
