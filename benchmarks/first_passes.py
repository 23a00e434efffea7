"""What a prefill pays for being the first of its size.

    python benchmarks/first_passes.py FOLDER [--threads 1] [--prompts 40] [--rounds 3]

FOLDER: the checkpoint of benchmarks/make_moe.py, made where it is missing. oneDNN makes code for each number of rows,
and keeps it for a limited number of them. Each prefill runs twice, and what the first takes over the second is printed,
as the sum over all prompts: with the rows that the router counts for each expert, and filled up to a multiple
(executor.linear.EVEN_ROWS), as the engine does. What that costs a prefill that comes again is printed too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from make_moe import make

import executor.linear
from executor.batch import SequenceState
from executor.measure import random_entries
from executor.runner import Runner, run_to_end
from executor.subject import load_subject

BLOCK, SMALLEST, LARGEST = 16, 256, 1024


def seconds(runner: Runner, entry: tuple[SequenceState, int]) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_subject(str(make(args.folder)), dtype="float32").model
    chosen = executor.linear.EVEN_ROWS
    runner, rng = Runner(model, LARGEST // BLOCK, BLOCK), random.Random(0)
    even: dict[int, list[tuple[float, float]]] = {1: [], chosen: []}
    with torch.inference_mode():
        of_sizes(runner, [rng.randint(SMALLEST, LARGEST) for _ in range(args.prompts)], "warm")
        for number in range(args.rounds):  # in turn, so that the machine's drift meets all alike
            sizes = [rng.randint(SMALLEST, LARGEST) for _ in range(args.prompts)]
            for rows, found in even.items():
                executor.linear.EVEN_ROWS = rows
                found.append(of_sizes(runner, sizes, str(number)))
    print(f"prefills of {SMALLEST} to {LARGEST} tokens, first over again (median of {args.rounds} rounds)")
    for rows, found in even.items():
        print(f"  experts get multiples of {rows} rows: {statistics.median(a / b for a, b in found):.3f}")
    cost = statistics.median(b / a for (_, a), (_, b) in zip(even[1], even[chosen], strict=True))
    print(f"  again, multiples of {chosen} over multiples of 1: {cost:.3f}")


if __name__ == "__main__":
    main()
