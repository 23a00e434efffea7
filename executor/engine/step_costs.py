"""How long the steps of this model take on this device: measured when an engine starts, to split passes by."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from qllm.executor.engine.hook_clock import Stopwatch, Timer, timed
from qllm.executor.model.info import embedding
from qllm.executor.model.packed_batch import Batch, Sequence
from qllm.executor.model.passes import RunAhead, RunningPass
from qllm.executor.model.runner import Runner
from qllm.executor.model.split import LinearSplitter, whole

LAYERS = 8  # of a pass that are measured: some models begin with layers without experts, or mix two attentions
MOST_ROWS = 8192  # of the longest pass
LEAST_ROWS = 256  # below, nothing is learnt about long passes
FEW_ROWS = 4  # of each expert, in the shortest pass: all experts have some, and their weights take longest
REPEATS = 4  # the first of which compiles kernels and finds memory

log = logging.getLogger(__name__)


def measured_splitter(
    runner: Runner,
    n_experts: int,
    top_k: int,
    max_step: float,
    *,
    most_rows: int = MOST_ROWS,
    timer: Timer | None = None,
) -> LinearSplitter:
    """A splitter with the step times of the runner's model on its device, in a second or two.

    For a device that launches a group of experts at once. Whole layers of three passes are timed: few rows, many, and
    half as many. Many rows tell what a row and an attention cell take, few what it takes to read an expert's weights.

    Args:
        runner: its cache is made, nothing is served yet; the KV of its first blocks is overwritten.
        n_experts: of each MoE layer.
        top_k: experts that each token goes to.
        max_step: of the splitter, in seconds.
        most_rows: of a pass in serving. Where there can be but few rows in a pass, nothing is measured, nor cut.
        timer: reads the device's clock; by default events on an accelerator.
    """
    room = runner.cache.n_blocks * runner.cache.block_size
    most = min(MOST_ROWS, most_rows, room, runner.max_positions or room)
    while most >= LEAST_ROWS:
        sizes = (most, most // 2, max(2, min(most // 4, FEW_ROWS * n_experts // top_k)))
        try:
            times = {size: _Layers() for size in sizes}
            _measure(runner, sizes, times, timer)
        except torch.OutOfMemoryError:
            most //= 2
            continue
        if not any(layers.experts for layers in times.values()):
            break
        splitter = fit(sizes, times, n_experts, top_k, max_step)
        log.info(
            "step times: an expert's weights %.3g us, a row %.3g us, a launch %.3g us, 1,000 attention cells %.3g us",
            *(1e6 * splitter.expert, 1e6 * splitter.row, 1e6 * (splitter.launch or 0.0), 1e9 * splitter.cell),
        )
        return splitter
    return LinearSplitter(n_experts, top_k, max_step=max_step, expert=1e-12, row=1e-15, cell=0.0)


class _Layers:
    """Seconds of each layer's attention and experts, each the shortest of all repeats."""

    def __init__(self) -> None:
        self.attention: dict[int, float] = {}
        self.experts: dict[int, float] = {}

    def add(self, names: Iterable[str], seconds: Iterable[float]) -> None:
        numbers: dict[str, int] = defaultdict(int)
        for (name, following), took in zip(pairwise(names), seconds, strict=True):
            if (name, following) in (("attention", "attended"), ("experts", "routed")):
                kept = self.attention if name == "attention" else self.experts
                kept[numbers[name]] = min(took, kept.get(numbers[name], took))
                numbers[name] += 1


def _measure(runner: Runner, sizes: tuple[int, int, int], times: dict[int, _Layers], timer: Timer | None) -> None:
    """Time the first layers of passes over one prompt of each size."""
    with torch.inference_mode(), timed(runner.model, timer) as watch:
        # Nothing is waited for before the end: after a long pass the device still has work while a short one is
        # launched, and its times are not those of the host.
        found = [(size, _marks(runner, size, watch)) for _ in range(REPEATS) for size in (*sizes[1::-1], sizes[2])]
        for size, marks in found:
            names, moments = zip(*marks, strict=True)
            times[size].add(names, watch.timer.intervals(moments))


def _marks(runner: Runner, size: int, watch: Stopwatch) -> list[tuple[str, Any]]:
    """Run the first layers of a pass over a prompt of `size` tokens, none of them split."""
    watch.marks = []
    vocabulary = embedding(runner.model).num_embeddings
    tokens = random.Random(size).choices(range(vocabulary), k=size)
    run_first_layers(runner, batch_of(runner, tokens), LAYERS)
    return watch.marks


def batch_of(runner: Runner, prompt: list[int]) -> Batch:
    """The batch of a pass over `prompt`, with KV in the first blocks."""
    cache, n = runner.cache, len(prompt)
    sequence = Sequence(prompt, [*range(-(-n // cache.block_size))], ring=cache.ring_of(n))
    return Batch([(sequence, n)], cache, max_positions=runner.max_positions)


def run_first_layers(runner: Runner, batch: Batch, layers: int) -> None:
    """Run `layers` layers of a pass over `batch`, not split and not replayed."""
    split = whole(batch)
    forward = Runner.place(runner, batch, split, queues=False)  # that of a plain runner: no hook runs in a replay
    running = RunningPass(batch, split, forward, RunAhead(torch.device("cpu")), runner.windows)
    while (point := running.advance()) is not None:
        if point.layer >= layers:
            running.close()
            break


def fit(
    sizes: tuple[int, int, int], times: dict[int, _Layers], n_experts: int, top_k: int, max_step: float
) -> LinearSplitter:
    """The splitter that takes these times for layers of passes over many rows, half as many, and few."""
    many, half, few = sizes
    routed = {size: median(times[size].experts.values()) for size in sizes}
    attended = {size: max(times[size].attention.values()) for size in sizes}
    row = max(0.0, (routed[many] - routed[half]) / (many - half) / top_k)
    launch = max(0.0, routed[many] - row * top_k * many)
    cells = (many * (many + 1) - half * (half + 1)) / 2
    return LinearSplitter(
        n_experts,
        top_k,
        max_step=max_step,
        expert=routed[few] / n_experts,
        row=row,
        cell=max(0.0, (attended[many] - attended[half]) / cells),
        launch=min(launch, max_step / 2),  # no cut makes a launch shorter: else there would be one an expert
    )
