"""NVIDIA's published kernel measurements (aiconfigurator, Apache-2.0) as a timing trace.

The tables hold GPU kernel time of GEMMs, attention and fused MoE layers. The rest is modelled (header: `modelled`):
norms, rotary embedding, sampling, cached prefixes, launches, the host. Formulas: docs/timing_traces.md.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from qllm.traces import import_defaults as defaults
from qllm.traces.step_times.aiconfigurator.points import decode_points, dense_points, prefill_points
from qllm.traces.step_times.aiconfigurator.tables import DTYPES, LICENCE, Memory, Tables, series
from qllm.traces.step_times.expert_fit import OUTLIER, ExpertFit, fit_balanced
from qllm.traces.step_times.file_format import Point, TimingError, TimingWarning
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape
from qllm.traces.step_times.roofline import Gpu, least_of, least_seconds, named
from qllm.traces.step_times.timings import Timings

# Tokens of the largest block of a kernel that passes over an expert's weights once a block. SGLang's fused_marlin_moe
# takes blocks of 8, 16, 32, 48 or 64 tokens; the measured times step up after 64 and after each further 64.
TILES = {"sglang_marlin_moe": 64}
# Keys of `modelled` and `conditions`: what an import made of the rows, and which it took.
NOTES = ("faster than the memory", "sliding window", "of several kernels")
SLOW = 4.0  # times the roofline, from which other frameworks' tables are looked at
KERNEL_S = 5e-6  # what a kernel takes however little it does; the time of one expert is a part of a kernel's
_ALLOWED = f"allowed: {', '.join(WEIGHT_BYTES)}"
BETTER = 2.0  # times faster, from which one of them is named


@dataclass(frozen=True)
class _Part:
    """Points of some steps by one framework's kernels."""

    points: list[Point]
    name: str  # FRAMEWORK:VERSION of the table
    floored: Counter[str]  # rows of each step that were faster than the memory


@dataclass(frozen=True)
class _Experts(_Part):
    """f from one MoE table, and what it was made from."""

    fit: ExpertFit
    rows: pd.Series  # seconds of a layer by tokens, none faster than the memory
    kernels: list[str]
    device: str
    tile: int | None


class _Importer:
    """Steps from the tables of one GPU for one model, by whose kernels."""

    def __init__(self, tables: Tables, shape: ModelShape, moe: tuple[str, str], other: tuple[str, str]):
        """`moe`, `other`: the type of the kernels, and that of the weights in memory, of experts and of all else."""
        self.tables, self.shape = tables, shape
        self.moe_dtype, self.gemm_dtype = moe[0], other[0]
        self.expert_bytes, self.other_bytes = WEIGHT_BYTES[moe[1]], WEIGHT_BYTES[other[1]]
        self.memory = Memory(tables.system)
        gpu = Gpu(self.memory.peak, self._peak("bfloat16"))
        self.least = least_seconds(shape, gpu, (moe[1], self._peak(moe[0])), (other[1], self._peak(other[0])))

    def _peak(self, dtype: str) -> float:
        """Operations a second of a type; the most of any where the tables do not say."""
        peaks = {key: float(flops) for key, flops in self.tables.system["gpu"].items() if key.endswith("_tc_flops")}
        key = f"{DTYPES[dtype][1]}_tc_flops" if dtype in DTYPES else ""
        return peaks.get(key, max(peaks.values(), default=float("inf")))

    def dense(self, choice: str) -> _Part:
        """dense_pre, dense_post and head by GEMM kernels."""
        gemm, name = self.tables.read("gemm", choice, gemm_dtype=self.gemm_dtype)
        points = dense_points(gemm, self.shape, self.memory, "imported", self.other_bytes)
        return _Part(points, name, Counter(point.step for point in points if point.source == "modelled"))

    def attention(self, choice: str) -> _Part:
        """Prefill and decode attention, the mean over layers with and without a window."""
        shape, full = self.shape, self._attention(choice, 0)
        if not shape.window_layers:
            return full
        windowed, share = self._attention(choice, shape.window), shape.window_layers / shape.layers
        other = {point[:3]: point for point in windowed.points}
        points = [
            point._replace(
                seconds=(1 - share) * point.seconds + share * part.seconds,
                source="imported" if point.source == part.source == "imported" else "modelled",
            )
            for point, part in ((point, other.get(point[:3])) for point in full.points)
            if part is not None
        ]
        return _Part(points, full.name, full.floored + windowed.floored)

    def _attention(self, choice: str, window: int) -> _Part:
        shape = self.shape
        wanted = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "head_dim": shape.head_dim}
        wanted |= {"num_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "window_size": window}
        context, _ = self.tables.read("context", choice, **wanted, batch_size=1, step=0)
        generation, name = self.tables.read("generation", choice, **wanted)
        kv = shape.kv_bytes_per_token() / shape.layers / self.memory.peak

        def least(batch: float, context: float) -> float:
            return batch * kv * (min(context, window) if window else context)

        decode = decode_points(generation, "imported", least)
        floored = sum(point.seconds == least(point.tokens, point.context or 0) for point in decode)
        points = prefill_points(series(context, "isl"), decode, "imported", window) + decode
        return _Part(points, name, Counter(attention_decode=floored))

    def experts(self, choice: str) -> _Experts:
        """base and f, from rows with evenly spread tokens."""
        shape = self.shape
        sizes = {"hidden_size": shape.hidden, "inter_size": shape.inter, "num_experts": shape.experts}
        alone = {"topk": shape.top_k, "moe_tp_size": 1, "moe_ep_size": 1, "distribution": "balanced"}
        layers, name = self.tables.read("moe", choice, moe_dtype=self.moe_dtype, **sizes, **alone)
        if "device" not in layers.columns:
            raise TimingError(f"moe table {name}: column 'device' is missing")
        kernels = sorted(layers["kernel_source"].unique().tolist())
        tile = TILES.get(kernels[0]) if len(kernels) == 1 else None
        rows = series(layers, "num_tokens")
        one = shape.expert_weights * self.expert_bytes / self.memory.peak
        least = np.minimum(rows.index.to_numpy() * shape.top_k, shape.experts) * one
        floored, rows = int((rows < least).sum()), rows.clip(lower=least)
        fit = fit_balanced(rows, shape.experts, shape.top_k, tile)
        points = [
            Point("expert", int(m), None, max(float(f), one), source="imported" if real else "modelled")
            for m, f, real in zip(fit.tokens, fit.seconds, fit.measured & (fit.seconds > 1.000001 * one), strict=True)
        ]
        device = str(layers["device"].iloc[0])
        return _Experts(points, name, Counter(expert=floored), fit, rows, kernels, device, tile)

    def slow(self, kind: str, option: str, mine: _Part, build: Callable[[str], _Part]) -> list[str]:
        """A line for the step whose rows are slow where another framework's kernels, by `build`, are not."""
        least = {p[:3]: max(least_of(self.least, p), 0.0 if p.step == "expert" else KERNEL_S) for p in mine.points}
        slow = {p[:3]: p for p in mine.points if p.source == "imported" and p.seconds > SLOW * least[p[:3]]}
        found = []
        for framework in self.tables.frameworks(kind) if slow else ():
            try:
                theirs = build(framework).points if framework != mine.name.partition(":")[0] else []
            except TimingError:  # it has no such rows
                continue
            for point in theirs:
                own = slow.get(point[:3])
                if own is not None and point.source == "imported" and own.seconds > BETTER * point.seconds:
                    found.append((own.seconds / point.seconds, own, point.seconds, framework))
        if not found:
            return []
        _, own, seconds, framework = max(found, key=lambda one: one[0])
        return [
            f"{named(own)} takes {1e6 * own.seconds:.4g} us by {mine.name}, "
            f"{own.seconds / least[own[:3]]:.1f} times what the GPU needs at least, and "
            f"{1e6 * seconds:.4g} us by {framework}; --{option} {framework}"
        ]


def _weights(given: str | None, dtype: str, what: str) -> str:
    """The type of weights, a key of WEIGHT_BYTES: as given, or that of the kernels."""
    if given is None and dtype in DTYPES:
        return DTYPES[dtype][0]
    if given is None:
        raise TimingError(f"{what} must be given, since the weights of {dtype!r} are not known; {_ALLOWED}")
    if given not in WEIGHT_BYTES:
        raise TimingError(f"{what}: unknown type of weights {given!r}; {_ALLOWED}")
    return given


def import_aiconfigurator(
    source: str | Path,
    *,
    shape: ModelShape,
    gpu: str = defaults.GPU,
    moe: str = defaults.KERNELS,
    moe_dtype: str = defaults.KERNEL_DTYPE,
    dense: str = defaults.KERNELS,
    gemm_dtype: str = defaults.KERNEL_DTYPE,
    attention: str = defaults.KERNELS,
    expert_weights: str | None = None,
    other_weights: str | None = None,
    name: str | None = None,
    launch_s: float = defaults.LAUNCH_S,
    host_s: float = defaults.HOST_S,
) -> Timings:
    """A timing trace of one model's shape on one GPU, from aiconfigurator's tables.

    Rows that are faster than the GPU's memory take their bytes / bandwidth. A TimingWarning says what is implausible:
    steps slower than four times the roofline where another framework's tables have better, a bad fit of the experts,
    weights beyond the GPU's memory. The trace keeps these lines.

    Args:
        source: "aiconfigurator-core" (the installed package) or a folder of its parquet files.
        shape: Sizes of the model.
        gpu: The GPU as the tables spell it.
        moe: Whose MoE kernels, as FRAMEWORK, FRAMEWORK:VERSION or FRAMEWORK:VERSION:KERNEL. By default the newest
            version; where kernels were measured at the same sizes, the one with the most rows, or the fastest of those.
        moe_dtype: Their type as the tables spell it, e.g. "bfloat16" or "int4_wo".
        dense: Whose GEMM kernels.
        gemm_dtype: Their type.
        attention: Whose attention kernels.
        expert_weights: Key of `model_shapes.WEIGHT_BYTES`: the experts' size in memory; default: that of `moe_dtype`.
        other_weights: The same for all other weights; default: that of `gemm_dtype`.
        name: Of the trace; default: made from GPU, model and type.
        launch_s: Seconds per kernel launch; the tables do not hold it.
        host_s: Seconds of host time per pass; the tables do not hold it.

    Raises:
        TimingError: The tables hold no such GPU, kernel or shape; the message lists what they hold.
    """
    tables = Tables(source, gpu)
    if shape.latent_kv:
        raise TimingError(f"{shape.name}: latent attention is not among the tables that this importer reads")
    expert_weights = _weights(expert_weights, moe_dtype, "expert_weights")
    other_weights = _weights(other_weights, gemm_dtype, "other_weights")
    importer = _Importer(tables, shape, (moe_dtype, expert_weights), (gemm_dtype, other_weights))
    gemm, attended, experts = importer.dense(dense), importer.attention(attention), importer.experts(moe)
    fit = experts.fit
    errors, dropped = np.abs(fit.errors), tuple(experts.rows.index[~fit.kept].tolist())
    told = importer.slow("gemm", "dense", gemm, importer.dense)
    told += importer.slow("generation", "attention", attended, importer.attention)
    told += importer.slow("moe", "moe", experts, importer.experts)
    if errors.max() > OUTLIER:
        worst = int(errors.argmax())
        told.append(
            f"experts: t = base + sum f(m) is {errors.max():.0%} off the {1e6 * experts.rows.iloc[worst]:.4g} us of "
            f"{experts.rows.index[worst]} tokens, {errors.mean():.1%} in the mean of all rows"
        )
    floored = gemm.floored + attended.floored + experts.floored
    timings = Timings(
        points=tuple(gemm.points + attended.points + experts.points),
        name=name or f"{gpu}-{shape.name}-{moe_dtype}",
        source="imported",
        device=experts.device,
        model=shape.name,
        dtype=f"experts {moe_dtype}, the rest {gemm_dtype}",
        framework=f"MoE {experts.name} ({', '.join(experts.kernels)}), GEMM {gemm.name}, attention {attended.name}",
        date="not stated by the tables",
        licence=LICENCE,
        provenance=f"NVIDIA aiconfigurator's tables for {gpu}, read by step_times/aiconfigurator/; "
        "see docs/timing_traces.md",
        layers=shape.layers,
        hidden=shape.hidden,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_mode="fused",
        experts_base_s=float(f"{fit.base:.6g}"),
        launch_s=launch_s,
        launches_per_expert=3,
        host_s=host_s,
        suspend_s=2 * launch_s,
        resume_s=launch_s,
        kv_bytes_per_token=shape.kv_bytes_per_token(),
        weights_bytes=shape.weights_bytes(expert_weights, other_weights),
        memory_bytes=int(tables.system["gpu"]["mem_capacity"]),
        host_bandwidth=float(tables.system["node"]["pcie_bw"]),
        max_context=shape.max_context or None,
        least_s=importer.least,
        conditions={
            "timed": "kernel time: CUDA-graph replays between CUDA events; repeats and spread not stated",
            "expert_fit": f"relative error on its own rows: mean {errors.mean():.4f}, largest {errors.max():.4f}",
            **({"expert_fit_dropped": f"rows of {dropped} tokens, far off the line"} if dropped else {}),
            **_kernels(tables, gemm, attended, experts),
            **({"implausible": told} if told else {}),
        },
        modelled={
            "dense_pre, dense_post, head": "measured GEMMs plus norm, rotary embedding, KV write, sampling as memory "
            "traffic (aiconfigurator's bytes / (0.8 x bandwidth) + 3 us)",
            "attention_prefill": "rows with a context, and beyond the longest measured prompt (source = modelled)",
            "attention_decode": "outliers, corners that did not fit the GPU, the longest context (source = modelled)",
            "experts_base_s, expert": "t = base + sum f(m), fitted to rows with evenly spread tokens"
            + (f"; steps of {experts.tile} tokens, the kernel's block (source = modelled)" if experts.tile else ""),
            **_notes(shape, floored),
            "launch_s": "parameter, about 5 us a launch by secondary sources",
            "host_s": "parameter, no measurement",
            "suspend_s, resume_s": "an event synchronise (taken as one launch) plus one launch; one launch",
        },
    )
    for line in timings.implausible():
        warnings.warn(f"timings {timings.name!r}: {line}", TimingWarning, stacklevel=2)
    return timings


def _kernels(tables: Tables, *parts: _Part) -> dict[str, str]:
    """What the header says of kernels that were measured at the same sizes: which was taken."""
    lines = [
        f"{part.name}, not {', '.join(tables.passed_over[part.name])}"
        for part in parts
        if part.name in tables.passed_over
    ]
    return {NOTES[2]: "; ".join(lines)} if lines else {}


def _notes(shape: ModelShape, floored: Mapping[str, int]) -> dict[str, str]:
    """What the header says of rows below the roofline, and of layers with a sliding window."""
    notes = {}
    if any(floored.values()):
        rows = ", ".join(f"{count} of {step}" for step, count in floored.items() if count)
        notes[NOTES[0]] = (
            f"rows whose weights or KV had stayed in the L2 cache take bytes / bandwidth (source = modelled): {rows}"
        )
    if shape.window_layers:
        notes[NOTES[1]] = (
            f"attention is the mean over {shape.layers} layers, of which {shape.window_layers} see the last "
            f"{shape.window} tokens; kv_bytes_per_token counts all layers"
        )
    return notes
