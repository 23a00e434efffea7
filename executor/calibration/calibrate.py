"""Calibration: measures a model's passes on this machine and writes a timing trace."""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qllm.executor.calibration.engine_overhead import loop_seconds, wake_seconds
from qllm.executor.calibration.environment import conditions, device_name, versions
from qllm.executor.calibration.fit import (
    Measured,
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
    steadiness,
    wide,
)
from qllm.executor.calibration.grid import pass_kinds
from qllm.executor.calibration.profiler import BLOCK, PRECISION, ROUNDS, Profiler, Progress, rings_for
from qllm.executor.calibration.store import MeasurementStore
from qllm.executor.errors import CalibrationError
from qllm.executor.model.info import memory_bytes, model_facts
from qllm.executor.model.loading import LoadedModel
from qllm.executor.model.runner import max_positions
from qllm.traces.step_times.timings import Timings

KV_SHARE = 0.25  # of the free memory, for the KV that is attended to


class CalibrationWarning(UserWarning):
    """A measurement that scatters widely; the message says which and how much."""


@dataclass(frozen=True)
class Extent:
    """How far a calibration measures. Raises CalibrationError where that is too little."""

    max_tokens: int = 2048  #: new tokens in a pass
    max_context: int = 4096  #: tokens cached before them
    max_batch: int = 32  #: sequences that decode together

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 2), ("max_context", 1), ("max_batch", 2)):
            value = getattr(self, name)
            if value < least:
                raise CalibrationError(f"--{name.replace('_', '-')} is {value}, must be at least {least}")

    def kv_tokens(self, room: int) -> int:
        """KV slots to measure with, `room` at most, but as many as the longest sequence needs."""
        longest = self.max_tokens + self.max_context
        return max(longest, min(room, self.max_batch * (self.max_context + 1)))


def calibrate(
    loaded: LoadedModel, out: Path, extent: Extent | None = None, progress: Progress | None = None
) -> Timings:
    """Measure a model on its device and write a timing trace to `out`. Warns where measurements scatter.

    Until then finished measurements are kept in `out` with the suffix .measured, and the same call goes on from there.
    CalibrationError: they are of something else, or the extent does not fit the model.
    """
    extent = extent or Extent()
    model, facts = loaded.model, model_facts(loaded.model)
    limit = max_positions(model.config) or 1_000_000_000
    if extent.max_tokens + extent.max_context > limit:
        raise CalibrationError(
            f"--max-tokens {extent.max_tokens} over --max-context {extent.max_context} is beyond the model's "
            f"{limit} positions"
        )
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # kernels go to the current device
    device = device_name(model.device)
    rings = rings_for(model, extent.max_batch)
    windows = 0 if rings is None else rings.n_blocks * BLOCK * facts["window_bytes_per_token"]
    left = KV_SHARE * memory_bytes(model.device)[0] - windows
    kv_tokens = extent.kv_tokens(int(left / facts["kv_bytes_per_token"]))
    kinds = pass_kinds(**vars(extent), kv_tokens=kv_tokens, experts=facts["experts"], top_k=facts["top_k"])
    measured_of = {"model": loaded.name, "device": device, **facts, **vars(extent), "versions": versions()}
    store = MeasurementStore(out.with_name(out.name + ".measured"), measured_of)
    profiler = Profiler(model, kv_tokens, extent.max_batch)
    profiler.measure(kinds, store, progress)
    with torch.inference_mode():
        for name, once in (("switch_s", profiler.switch_seconds), ("bandwidth", profiler.bandwidth)):
            if name not in store.numbers:
                store.add_number(name, once())
    if not {"loop_s", "between_s"} <= store.numbers.keys():
        loop = loop_seconds(model, max(1, extent.max_batch // 4))
        store.add_number("between_s", loop.between)
        store.add_number("loop_s", loop.all)
    if "wake_s" not in store.numbers:
        store.add_number("wake_s", wake_seconds(model))
    measured = {kind: store.samples[kind.key] for kind in kinds}
    _warn(measured)
    timings = _timings(loaded, facts, device, measured, store.numbers)
    timings.save(out)
    store.path.unlink()
    return timings


def _warn(measured: Measured) -> None:
    """A CalibrationWarning where passes scatter widely."""
    scattered = wide(measured)
    if scattered:
        kind, most = scattered[0]
        warnings.warn(
            f"{len(scattered)} of {len(measured)} kinds of passes scatter by more than 20 % (interquartile range over "
            f"mean); the widest: {kind.sequences} x {kind.new} tokens over {kind.context}, {most:.0%}. Is the "
            "machine busy?",
            CalibrationWarning,
            stacklevel=3,
        )


def _timings(
    loaded: LoadedModel, facts: dict[str, Any], device: str, measured: Measured, numbers: dict[str, float]
) -> Timings:
    """The timing trace of finished measurements."""
    layers, share = facts["layers"], facts["moe_layers"] / facts["layers"]
    per_sequence = facts["window"] * facts["window_bytes_per_token"] + facts["state_bytes"]
    host_s = host_seconds(measured)
    fit = expert_fit(measured)
    dense = dense_points(measured, layers, host_s)
    attention = attention_points(measured, layers, beyond_steps(measured, dense, fit, layers, host_s))
    launches = launch_points(measured, share)
    points = dense_points(measured, layers, host_s, loaded.layers) + attention + expert_points(fit, share)
    for optional in (launches, after_prefill_points(measured)):
        if len(optional) > 1:  # one size makes no curve: `launch_s` says it, and a pass after a prompt is like others
            points += optional
    modelled = {
        "attention_prefill": "sizes between the measured ones",
        "attention_decode": "corners whose KV does not fit in memory: along the last slope over the context",
    }
    if loaded.layers != layers:
        modelled["layers"] = f"{layers} layers with random weights were measured, {loaded.layers} are assumed alike"
    return Timings(
        points=tuple(points),
        name=f"{device}: {loaded.name}",
        source="measured",
        device=device,
        model=loaded.name,
        dtype=facts["dtype"],
        framework="qllm",
        date=date.today().isoformat(),
        licence="of whoever measured it",
        provenance=f"qllm calibrate, weights: {loaded.weights}, random prompts",
        layers=loaded.layers,
        hidden=facts["hidden"],
        experts=facts["experts"],
        top_k=facts["top_k"],
        expert_mode="fused",
        experts_base_s=fit.base * share,
        launch_s=statistics.median([point.seconds for point in launches] or [0.0]),
        launches_per_expert=1,
        query_block_s=query_block_seconds(measured, layers),
        host_s=host_s + numbers["loop_s"],
        engine_loop_s=numbers["loop_s"],
        engine_between_s=numbers["between_s"],
        suspend_s=numbers["switch_s"] / 2,
        resume_s=numbers["switch_s"] / 2,
        wake_s=numbers["wake_s"],
        kv_bytes_per_token=facts["kv_bytes_per_token"] * loaded.layers // layers,
        sequence_bytes=per_sequence * loaded.layers // layers,
        weights_bytes=loaded.weights_bytes,
        memory_bytes=memory_bytes(loaded.model.device)[1],
        host_bandwidth=numbers["bandwidth"],
        max_context=max_positions(loaded.model.config),
        repeats=min(found.repeats for found in measured.values()),
        versions=versions(),
        conditions={
            **conditions(loaded.model.device),
            "statistic": "means; spread_s is the interquartile range",
            "precision": f"repeated until 95 % intervals are within {PRECISION:.0%}, {ROUNDS[0]} to {ROUNDS[1]} rounds",
            "worst_interval": round(max(found.uncertainty() for found in measured.values()), 4),
            **fit_quality(fit),
            **steadiness(measured),
        },
        modelled=modelled,
    )
