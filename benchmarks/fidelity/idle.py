"""What a prompt takes after the machine stood idle, over the same at a busy one: the engine sleeping or polling.

    python benchmarks/fidelity/idle.py FOLDER [--threads 1] [--repeats 2] [--prompts 15]

FOLDER: the checkpoint of tools/make_moe.py, made where it is missing. Prompts of one output token, each a pass of
its own, arrive right after one another, or after pauses of a tenth of a second to a second, in random order. Prints the
mean pass of each size and its ratio to one without a pause before it. Needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from qllm.executor import Engine, RealClock, replay
from qllm.executor.model.loading import load
from qllm.executor.testing import make_checkpoint
from qllm.scheduler import Limits
from qllm.traces.requests.trace import RequestTrace

SIZES = (24, 96, 256)
PAUSES = (0.0, 0.1, 0.3, 1.0)  # seconds
LIMITS = Limits(max_seqs=1, max_batched_tokens=1024, kv_blocks=512)


def passes(model: PreTrainedModel, size: int, prompts: int, polls: bool, seed: int) -> list[tuple[float, float]]:
    """(pause before it, what it took) of each pass over a prompt of `size` tokens, seconds. A pause is counted from
    the last arrival, so that one of 0.1 s may find the pass before still running: then it is none."""
    pauses = np.random.default_rng(seed).permutation(np.repeat(PAUSES, prompts))
    ones = np.ones(len(pauses), dtype=int)
    room = np.where(pauses > 0, size * 1.5e-3 + 0.05, 0.0)  # for the pass before
    trace = RequestTrace(np.cumsum(pauses + room), size * ones, ones, 0 * ones, ("all",))
    with Engine(model, limits=LIMITS, clock=RealClock(polls=polls)) as engine:
        replay(engine, trace.head(10), priorities={"all": 0})
        slices = replay(engine, trace, priorities={"all": 0}).slices or []
    return [(after.start - before.end, after.end - after.start) for before, after in pairwise(slices)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=15, help="of each size and pause in a repeat")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(str(make_checkpoint(args.folder)), dtype="float32").model
    rows = []
    for repeat in range(args.repeats):
        for polls in (False, True):
            for size in SIZES:
                for pause, took in passes(model, size, args.prompts, polls, repeat):
                    after = "busy" if pause < 0.005 else "idle"
                    rows.append((size, "polls" if polls else "sleeps", after, took * 1e3))
    frame = pd.DataFrame(rows, columns=["prompt", "engine", "after", "ms"])
    table = frame.pivot_table(index=["prompt", "engine"], columns="after", values="ms", aggfunc="mean")
    table["ratio"] = table["idle"] / table["busy"]
    print(table.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
