"""Calibration: measures a model's passes on this machine and writes a timing trace."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qllm.executor.calibration.engine_overhead import loop_seconds, wake_seconds
from qllm.executor.calibration.fit import (
    after_prefill_points,
    attention_points,
    beyond_steps,
    dense_points,
    expert_fit,
    expert_points,
    fit_quality,
    host_seconds,
    launch_points,
    query_block_seconds,
    wide,
)
from qllm.executor.calibration.grid import Cell, cells
from qllm.executor.calibration.profiler import PRECISION, ROUNDS, Bench, Visit
from qllm.executor.calibration.store import CalibrationError, Kept, Measured
from qllm.executor.calibration.subject import Subject
from qllm.executor.model.info import conditions, device_name, memory_bytes, model_facts, versions
from qllm.executor.model.runner import max_positions
from qllm.traces.step_times.timings import Timings

#: called with (visits done, visits planned)
Progress = Callable[[int, int], None]

KV_SHARE = 0.25  # of the free memory, for the KV that is attended to


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


def calibrate(subject: Subject, out: Path, extent: Extent | None = None, progress: Progress | None = None) -> Timings:
    """Measure `subject` and write the timing trace `out`; returns it.

    Finished measurements are kept in `out` with the suffix .measured until the trace is written; the same call after
    an interruption goes on from there. Raises CalibrationError where they are of something else, or where the extent
    does not fit the model. Warns with CalibrationWarning where measurements scatter.
    """
    visits = calibration(subject, out, extent)
    while True:
        try:
            visit = next(visits)
        except StopIteration as end:
            timings: Timings = end.value
            return timings
        if progress is not None:
            progress(visit.done, visit.planned)


def calibration(
    subject: Subject, out: Path, extent: Extent | None = None, rounds: tuple[int, int] = ROUNDS
) -> Generator[Visit, None, Timings]:
    """`calibrate`, one visit to one kind of pass at a time: yields the visits and returns the trace. rounds: of visits
    to all kinds of passes, at least and at most.

    Between two visits the model may be used for something else, so that what is measured meanwhile and the calibration
    see the same machine. What follows the last visit uses an engine: not for an engine's thread.
    """
    extent = extent or Extent()
    model, facts = subject.model, model_facts(subject.model)
    limit = max_positions(model.config) or 1_000_000_000
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
    yield from bench.visits(grid, kept, rounds)
    with torch.inference_mode():
        for name, once in (("switch_s", bench.switch_seconds), ("bandwidth", bench.bandwidth)):
            if name not in kept.numbers:
                kept.number(name, once())
    if not {"loop_s", "between_s"} <= kept.numbers.keys():
        loop = loop_seconds(model, max(1, extent.max_batch // 4))
        kept.number("between_s", loop.between)
        kept.number("loop_s", loop.all)
    if "wake_s" not in kept.numbers:
        kept.number("wake_s", wake_seconds(model))
    warn({cell: kept.cells[cell.key] for cell in grid})
    measured, drift = kept.steady(grid, extent.max_batch)
    timings = build(subject, facts, device, extent, measured, {**kept.numbers, "drift": drift}, rounds)
    timings.save(out)
    kept.path.unlink()
    return timings


def warn(measured: dict[Cell, Measured]) -> None:
    """A CalibrationWarning where passes scatter widely, as they were measured."""
    scattered = wide(measured)
    if scattered:
        cell, most = scattered[0]
        warnings.warn(
            f"{len(scattered)} of {len(measured)} kinds of passes scatter by more than 20 % (interquartile range over "
            f"median); the widest: {cell.sequences} x {cell.new} tokens over {cell.context}, {most:.0%}. Is the "
            "machine busy?",
            CalibrationWarning,
            stacklevel=4,
        )


def build(
    subject: Subject,
    facts: dict[str, Any],
    device: str,
    extent: Extent,
    measured: dict[Cell, Measured],
    numbers: dict[str, float],
    rounds: tuple[int, int],
) -> Timings:
    """The timing trace of finished measurements."""
    layers, share = facts["layers"], facts["moe_layers"] / facts["layers"]
    host_s = host_seconds(measured)
    fit = expert_fit(measured)
    dense = dense_points(measured, layers, host_s)
    attention = attention_points(measured, layers, beyond_steps(measured, dense, fit, layers, host_s))
    launches = launch_points(measured, share)
    points = dense + attention + expert_points(fit, share)
    for optional in (launches, after_prefill_points(measured)):
        if len(optional) > 1:  # one size makes no curve: `launch_s` says it, and a pass after a prompt is like others
            points += optional
    modelled = {
        "attention_prefill": "sizes between the measured ones",
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
        launch_s=statistics.median([point.seconds for point in launches] or [0.0]),
        launches_per_expert=1,
        query_block_s=query_block_seconds(measured, layers),
        host_s=host_s + numbers["loop_s"],
        suspend_s=numbers["switch_s"] / 2,
        resume_s=numbers["switch_s"] / 2,
        wake_s=numbers["wake_s"],
        kv_bytes_per_token=facts["kv_bytes_per_token"] * subject.layers // layers,
        weights_bytes=subject.weights_bytes,
        memory_bytes=memory_bytes(subject.model.device)[1],
        host_bandwidth=numbers["bandwidth"],
        repeats=min(found.repeats for found in measured.values()),
        versions=versions(),
        conditions={
            **conditions(subject.model.device),
            "statistic": "means; spread_s is the interquartile range",
            "precision": f"visited until 95 % intervals are within {PRECISION:.0%}, {rounds[0]} to {rounds[1]} times",
            "engine_loop_s": round(numbers["loop_s"], 9),  # part of host_s
            "engine_between_s": round(numbers["between_s"], 9),  # part of engine_loop_s
            "speed_drift": round(numbers["drift"], 4),  # standard deviation over the calibration; not in `seconds`
            "worst_interval": round(max(found.uncertainty() for found in measured.values()), 4),
            **fit_quality(fit),
        },
        modelled=modelled,
    )
