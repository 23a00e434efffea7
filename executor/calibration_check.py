"""Whole passes against the sum of their steps."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from executor.batch import SequenceState
from executor.cuts import Cut
from executor.runner import Runner, run_to_end
from executor.sampling import Sampling, sample
from traces.steps import StepModel

#: (new tokens, tokens cached before) of each sequence of a pass
Mix = list[tuple[int, int]]


@dataclass(frozen=True)
class Checked:
    """One kind of pass: measured and predicted seconds (medians)."""

    mix: Mix
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted / self.measured - 1


def check_passes(runner: Runner, steps: StepModel, mixes: list[Mix], repeats: int = 5) -> list[Checked]:
    """Run each mix uninterrupted, cut as the step model cuts it, and compare with `StepModel.total` for the routing
    that it had. Measured from the batch to the sampled tokens; nothing is read inside the pass."""
    times: list[list[float]] = [[] for _ in mixes]
    predicted = [0.0] * len(mixes)
    with torch.inference_mode():
        for number in range(repeats + 1):  # rounds, so that a disturbance hits one repeat of many; the first warms up
            for at, mix in enumerate(mixes):
                seconds, predicted[at] = _once(runner, steps, mix)
                if number:
                    times[at].append(seconds)
    medians = map(statistics.median, times)
    return [Checked(mix, m, p) for mix, m, p in zip(mixes, medians, predicted, strict=True)]


def _once(runner: Runner, steps: StepModel, mix: Mix) -> tuple[float, float]:
    vocab: int = runner.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    rng, size, next_block = random.Random(str(mix)), runner.cache.block_size, 0
    entries = []
    for new, context in mix:
        blocks = range(next_block, next_block + -(-(new + context) // size))
        next_block = blocks.stop
        entries.append((SequenceState(rng.choices(range(vocab), k=new + context), [*blocks], context), new))
    prefill = [(None, new, context) for new, context in mix if new > 1]
    decoding = [context for new, context in mix if new == 1]
    shape = steps.shape(prefill, len(decoding), sum(decoding), len(mix))
    _wait(runner)
    start = time.perf_counter()
    running = runner.begin(entries, Cut(shape.group, shape.pieces))
    logits = run_to_end(running)
    rows = len(running.sampled)
    sample(logits, [Sampling()] * rows, [0] * rows, [0] * rows)
    _wait(runner)
    seconds = time.perf_counter() - start
    experts_s = float(steps.experts(np.array(running.routing)).sum()) * steps.layers / len(running.routing)
    return seconds, steps.total(shape, experts_s)


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
        mixes += [[(1, int(max_context * c * (0.5 + i / batch))) for i in range(batch)] for c in (0.06, 0.3)]
    few = max(1, max_batch // 3)
    mixes.append([(max(2, max_tokens // 8), 0)] * 3)
    mixes.append([(max(2, max_tokens // 3), 0), *[(1, max_context // 5)] * few])
    return mixes
