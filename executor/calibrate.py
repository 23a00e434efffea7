"""Calibration: measures a model's passes on this machine and writes a timing trace."""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from executor.batch import Batch, SequenceState
from executor.cuts import Cut
from executor.facts import conditions, device_name, memory_bytes, model_facts, versions
from executor.grids import Cell, cells
from executor.measure import PassTimes, Stopwatch, measure, timed
from executor.measured import CalibrationError, Kept, Measured
from executor.runner import Runner, run_to_end
from executor.timing_points import (
    attention_points,
    dense_points,
    expert_fit,
    expert_points,
    fit_quality,
    host_seconds,
    wide,
)
from traces.timing import Timings

BLOCK = 16  # KV slots in a block
SHORT_S = 0.25  # passes below this are repeated SHORT times a visit, longer ones once
SHORT = 5
ROUNDS = (2, 5)  # visits to each kind of pass: at least, at most
PRECISION = 0.02  # half the 95 % interval of the median; further visits until it is below
KV_SHARE = 0.25  # of the free memory, for the KV that is attended to

#: called with (visits done, visits planned)
Progress = Callable[[int, int], None]


class CalibrationWarning(UserWarning):
    """A measurement that scatters widely; the message says which and how much."""


@dataclass(frozen=True)
class Extent:
    """How far a calibration measures: new tokens in a pass, tokens cached before them, sequences that decode."""

    max_tokens: int = 2048
    max_context: int = 4096
    max_batch: int = 32

    def __post_init__(self) -> None:
        for name, value, least in (("max_tokens", self.max_tokens, 2), ("max_context", self.max_context, 1)):
            if value < least:
                raise CalibrationError(f"--{name.replace('_', '-')} is {value}, must be at least {least}")
        if self.max_batch < 2:
            raise CalibrationError(f"--max-batch is {self.max_batch}, must be at least 2")


@dataclass(frozen=True)
class Subject:
    """What is calibrated. name: of the model; layers: of the whole model, `model` may have fewer; weights_bytes: of
    the whole model; weights: where they are from, for the header."""

    name: str
    model: PreTrainedModel
    layers: int
    weights_bytes: int
    weights: str = "checkpoint"


def calibrate(subject: Subject, out: Path, extent: Extent | None = None, progress: Progress | None = None) -> Timings:
    """Measure `subject` and write the timing trace `out`; returns it.

    Finished measurements are kept in `out` with the suffix .measured until the trace is written; the same call after
    an interruption goes on from there. Raises CalibrationError where they are of something else, or where the extent
    does not fit the model. Warns with CalibrationWarning where measurements scatter.
    """
    extent = extent or Extent()
    model, facts = subject.model, model_facts(subject.model)
    limit = model_limit(model)
    if extent.max_tokens + extent.max_context > limit:
        raise CalibrationError(
            f"--max-tokens {extent.max_tokens} over --max-context {extent.max_context} is beyond the model's "
            f"{limit} positions"
        )
    device = device_name(model.device)
    room = int(KV_SHARE * memory_bytes(model.device)[0] / facts["kv_bytes_per_token"])
    need = max(extent.max_tokens + extent.max_context, extent.max_batch * (extent.max_context + 1))
    kv_tokens = max(extent.max_tokens + extent.max_context, min(need, room))
    grid = cells(**vars(extent), kv_tokens=kv_tokens, experts=facts["experts"], top_k=facts["top_k"])
    of = {"model": subject.name, "device": device, **facts, **vars(extent), "versions": versions()}
    kept = Kept(out.with_name(out.name + ".measured"), of)
    bench = Bench(model, kv_tokens, extent.max_batch)
    with torch.inference_mode():
        bench.visit_all(grid, kept, progress)
        for name, once in (("switch_s", bench.switch_seconds), ("bandwidth", bench.bandwidth)):
            if name not in kept.numbers:
                kept.number(name, once())
    timings = build(subject, facts, device, extent, {cell: kept.cells[cell.key] for cell in grid}, kept.numbers)
    timings.save(out)
    kept.path.unlink()
    return timings


def model_limit(model: PreTrainedModel) -> int:
    """Positions that the model has; a billion where its configuration does not say."""
    return Runner(model, kv_blocks=1).max_positions or 1_000_000_000


class Bench:
    """The runner, its KV and the random prompts that calibration measures with."""

    def __init__(self, model: PreTrainedModel, kv_tokens: int, max_batch: int):
        self.cut = Cut()
        self.runner = Runner(model, -(-kv_tokens // BLOCK) + max_batch + 1, BLOCK, cutter=self.cutter)
        self.vocab: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        self.model = model

    def cutter(self, batch: Batch) -> Cut:
        """The cut that the next pass is to have."""
        return self.cut

    def sequences(self, cell: Cell) -> list[tuple[SequenceState, int]]:
        """Random tokens, the same in each visit. What is cached before them is whatever the KV cache holds, which
        takes as long to attend to."""
        rng = random.Random(cell.key)
        length = cell.new + cell.context
        blocks = -(-length // BLOCK)
        return [
            (
                SequenceState(
                    rng.choices(range(self.vocab), k=length), [*range(i * blocks, (i + 1) * blocks)], cell.context
                ),
                cell.new,
            )
            for i in range(cell.sequences)
        ]

    def visit_all(self, grid: list[Cell], kept: Kept, progress: Progress | None) -> None:
        """Measure every kind of pass in rounds, so that a disturbance does not hit all repeats of one."""
        done = sum(min(kept.rounds.get(cell.key, 0), ROUNDS[0]) for cell in grid)
        planned = ROUNDS[0] * len(grid)
        with timed(self.model) as watch:
            for number in range(ROUNDS[1]):
                for cell in grid:
                    if kept.rounds.get(cell.key, 0) > number or not self._wanted(kept, cell, number):
                        continue
                    kept.add(cell, self.visit(cell, watch))
                    done, planned = done + 1, max(planned, done + 1)
                    if progress is not None:
                        progress(done, planned)

    def _wanted(self, kept: Kept, cell: Cell, number: int) -> bool:
        return number < ROUNDS[0] or kept.cells[cell.key].uncertainty() > PRECISION

    def visit(self, cell: Cell, watch: Stopwatch) -> list[PassTimes]:
        """One warm-up pass and then the repeats of a visit."""
        self.cut = Cut(cell.group, 1)
        watch.steer = (lambda index, experts: steered(index, cell.hot)) if cell.hot else None
        entries = self.sequences(cell)
        warm = measure(self.runner, watch, entries)
        repeats = SHORT if warm.seconds < SHORT_S else 1
        passes = [measure(self.runner, watch, entries) for _ in range(repeats)]
        watch.steer = None
        return passes

    def switch_seconds(self) -> float:
        """What one suspension and its resumption cost: a prefill that is suspended before the attention of each layer
        for a decode pass of another sequence, against both for themselves. Median of SHORT repeats, at least 0."""
        self.cut = Cut(1 << 30, 1)
        new = min(256, self.runner.cache.n_blocks * BLOCK // 4)
        long, short = self.sequences(Cell(1, new, 0))[0], self.sequences(Cell(1, 1, new))[0]
        short[0].blocks = [block + -(-new // BLOCK) for block in short[0].blocks]
        costs = []
        for _ in range(SHORT + 1):
            plain = self._seconds(lambda: self._once(long))
            other = self._seconds(lambda: self._once(short))
            layers = 0

            def interleaved() -> None:
                nonlocal layers
                running = self.runner.begin([long])
                while (point := running.advance()) is not None:
                    if point.stage == "attention":
                        layers += 1
                        self._once(short)
                long[0].computed = 0

            costs.append((self._seconds(interleaved) - plain - layers * other) / layers)
        return max(0.0, statistics.median(costs[1:]))

    def _once(self, entry: tuple[SequenceState, int]) -> None:
        before = entry[0].computed
        run_to_end(self.runner.begin([entry]))
        entry[0].computed = before

    def bandwidth(self) -> float:
        """Bytes per second at which the KV of a sequence moves between the device and host memory."""
        tokens = min(1024, self.runner.cache.n_blocks * BLOCK)
        blocks = list(range(-(-tokens // BLOCK)))
        rates = []
        for _ in range(SHORT + 1):
            moved = 0

            def there_and_back() -> None:
                nonlocal moved
                host = self.runner.cache.offload(blocks, tokens)
                self.runner.cache.restore(host, blocks)
                moved = 2 * host.nbytes

            seconds = self._seconds(there_and_back)
            rates.append(moved / seconds)
        return statistics.median(rates[1:])

    def _seconds(self, what: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        what()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)


def steered(index: torch.Tensor, hot: int) -> torch.Tensor:
    """Top-k indices like `index` `[T, k]` that send all tokens to the first `hot` experts in turn."""
    rows, k = index.shape
    flat = torch.arange(rows * k, device=index.device, dtype=index.dtype)
    return (flat % hot).view(rows, k)


def build(
    subject: Subject,
    facts: dict[str, Any],
    device: str,
    extent: Extent,
    measured: dict[Cell, Measured],
    numbers: dict[str, float],
) -> Timings:
    """The timing trace of finished measurements."""
    layers, share = facts["layers"], facts["moe_layers"] / facts["layers"]
    scattered = wide(measured)
    if scattered:
        cell, most = scattered[0]
        warnings.warn(
            f"{len(scattered)} of {len(measured)} kinds of passes scatter by more than 20 % (interquartile range over "
            f"median); the widest: {cell.sequences} x {cell.new} tokens over {cell.context}, {most:.0%}. Is the "
            "machine busy?",
            CalibrationWarning,
            stacklevel=3,
        )
    host_s = host_seconds(measured)
    fit = expert_fit(measured)
    points = dense_points(measured, layers, host_s) + attention_points(measured, layers) + expert_points(fit, share)
    modelled = {
        "attention_prefill": "sizes between the measured ones over a cached context",
        "attention_decode": "corners whose KV does not fit in memory: along the last slope over the context",
    }
    if subject.layers != layers:
        modelled["layers"] = f"{layers} layers with random weights were measured, {subject.layers} are assumed alike"
    return Timings(
        points=tuple(points),
        name=f"{device}: {subject.name}",
        source="measured",
        device=device,
        model=subject.name,
        dtype=facts["dtype"],
        framework="qllm",
        date=date.today().isoformat(),
        licence="of whoever measured it",
        provenance=f"qllm calibrate, weights: {subject.weights}, random prompts",
        layers=subject.layers,
        hidden=facts["hidden"],
        experts=facts["experts"],
        top_k=facts["top_k"],
        expert_mode="fused",
        experts_base_s=fit.base * share,
        launch_s=fit.per_group * share,
        launches_per_expert=1,
        host_s=host_s,
        suspend_s=numbers["switch_s"] / 2,
        resume_s=numbers["switch_s"] / 2,
        kv_bytes_per_token=facts["kv_bytes_per_token"] * subject.layers // layers,
        weights_bytes=subject.weights_bytes,
        memory_bytes=memory_bytes(subject.model.device)[1],
        host_bandwidth=numbers["bandwidth"],
        repeats=min(found.repeats for found in measured.values()),
        versions=versions(),
        conditions={
            **conditions(subject.model.device),
            "statistic": "medians; spread_s is the interquartile range",
            "precision": f"repeated until 95 % intervals are within {PRECISION:.0%}, at most {ROUNDS[1]} visits",
            "worst_interval": round(max(found.uncertainty() for found in measured.values()), 4),
            **fit_quality(fit),
        },
        modelled=modelled,
    )
