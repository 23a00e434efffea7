"""Steps of one model on one GPU by whose kernels, from aiconfigurator's tables; none is faster than the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from qllm.traces.step_times.aiconfigurator.latent import latent_points
from qllm.traces.step_times.aiconfigurator.points import decode_points, dense_points, prefill_points
from qllm.traces.step_times.aiconfigurator.tables import DTYPES, Memory, Tables, series
from qllm.traces.step_times.data_sheet import Gpu
from qllm.traces.step_times.expert_fit import OUTLIER, ExpertFit, fit_balanced
from qllm.traces.step_times.file_format import Point, TimingError
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape
from qllm.traces.step_times.roofline import least_of, least_seconds, named

# Tokens of the largest block of a kernel that passes over an expert's weights once a block. SGLang's fused_marlin_moe
# takes blocks of 8, 16, 32, 48 or 64 tokens; the measured times step up after 64 and after each further 64.
TILES = {"sglang_marlin_moe": 64}
SLOW = 4.0  # times the roofline, from which other frameworks' tables are looked at
KERNEL_S = 5e-6  # what a kernel takes however little it does; the time of one expert is a part of a kernel's
FASTEST = "fastest"
BETTER = 2.0  # times faster, from which one of them is named


@dataclass(frozen=True)
class Part:
    """Points of some steps by one framework's kernels."""

    points: list[Point]
    name: str  # FRAMEWORK:VERSION of the table
    floored: Counter[str]  # rows of each step that were faster than the memory

    def curve(self) -> dict[Any, float]:
        """Seconds by size, to tell which framework is faster."""
        return {point[:3]: point.seconds for point in self.points}

    def good(self) -> bool:
        """Whether the points say what was measured."""
        return True


@dataclass(frozen=True)
class Experts(Part):
    """f from one MoE table, and what it was made from."""

    fit: ExpertFit
    rows: pd.Series  # seconds of a layer by tokens, none faster than the memory
    kernels: list[str]
    device: str
    tile: int | None

    def curve(self) -> dict[Any, float]:
        return dict(zip(self.rows.index.tolist(), self.rows.tolist(), strict=True))

    def good(self) -> bool:
        return bool(np.abs(self.fit.errors).max() <= OUTLIER)


_PartT = TypeVar("_PartT", bound=Part)


class Kernels:
    """Steps from the tables of one GPU for one model, by whose kernels."""

    def __init__(self, tables: Tables, shape: ModelShape, dense: str, moe: tuple[str, str], other: tuple[str, str]):
        """`moe`, `other`: the type of the kernels, and that of the weights in memory, of experts and of all else."""
        self.tables, self.shape, self.dense_choice = tables, shape, dense
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

    def dense(self, choice: str) -> Part:
        """dense_pre, dense_post and head by GEMM kernels."""
        gemm, name = self.tables.read("gemm", choice, gemm_dtype=self.gemm_dtype)
        points = dense_points(gemm, self.shape, self.memory, "imported", self.other_bytes)
        return Part(points, name, Counter(point.step for point in points if point.source == "modelled"))

    def attention(self, choice: str) -> Part:
        """Prefill and decode attention, the mean over layers with and without a window."""
        if self.shape.latent_kv:
            gemm = self.tables.read("gemm", self.dense_choice, gemm_dtype=self.gemm_dtype)[0]
            points, name, floored = latent_points(self.tables, choice, self.shape, gemm, self.memory, self.other_bytes)
            return Part(points, name, Counter(attention_decode=floored))
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
        return Part(points, full.name, full.floored + windowed.floored)

    def _attention(self, choice: str, window: int) -> Part:
        shape = self.shape
        wanted = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "head_dim": shape.head_dim}
        wanted |= {"num_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "window_size": window}
        context, _ = self.tables.read("context", choice, **wanted, batch_size=1, step=0)
        generation, name = self.tables.read("generation", choice, **wanted)
        kv = shape.kv_bytes_per_layer() / self.memory.peak

        def least(batch: float, context: float) -> float:
            return batch * kv * (min(context, window) if window else context)

        decode = decode_points(generation, "imported", least)
        floored = sum(point.seconds == least(point.tokens, point.context or 0) for point in decode)
        points = prefill_points(series(context, "isl"), decode, "imported", window) + decode
        return Part(points, name, Counter(attention_decode=floored))

    def experts(self, choice: str) -> Experts:
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
        return Experts(points, name, Counter(expert=floored), fit, rows, kernels, device, tile)

    def chosen(self, kind: str, choice: str, build: Callable[[str], _PartT]) -> _PartT:
        """`build` of that choice, or of the fastest framework."""
        if choice != FASTEST:
            return build(choice)
        parts, errors = [], []
        for framework in self.tables.frameworks(kind):
            try:
                parts.append(build(framework))
            except TimingError as error:  # it has no such rows
                errors.append(error)
        if not parts:
            raise errors[0] if errors else TimingError(f"{self.tables.root}: no {kind} table for {self.tables.gpu}")
        curves = [part.curve() for part in parts]
        common = set.intersection(*map(set, curves))
        means = [np.mean(np.log([curve[size] for size in common])) if common else 0.0 for curve in curves]
        order = sorted(zip([not part.good() for part in parts], means, range(len(parts)), strict=True))
        return parts[order[0][2]]

    def slow(self, kind: str, option: str, mine: Part, build: Callable[[str], Part]) -> list[str]:
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
