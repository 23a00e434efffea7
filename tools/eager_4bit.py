"""A model of a Hugging Face engine that keeps its weights in 4 bits: eager PyTorch, one expert after the other.

Every linear layer (the LM head apart) is a bitsandbytes `Linear4bit`: with more than one row in the batch it writes its
weights out as 16-bit numbers, then calls the plain GEMM. The GEMM and attention times are NVIDIA's measurements; all
else is counted or stated in EagerCosts. Nothing is fitted to a measured iteration; tools/check_hf_iteration.py
prints what comes out beside what the paper says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
from qllm.traces.step_times.aiconfigurator.tables import Memory, Tables, gemm_seconds
from qllm.traces.step_times.data_sheet import Gpu
from qllm.traces.step_times.file_format import Point
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape
from qllm.traces.step_times.roofline import least_seconds
from qllm.traces.step_times.timings import Timings

# Eager operations (each one launch) in transformers' modeling_mixtral.py, as of version 4.4x, by part of a layer.
NORM_OPS = 8  # MixtralRMSNorm: to float32, square, mean, add epsilon, rsqrt, multiply, to float16, scale
ROTARY_OPS = 10  # q and k: two products, negation, concatenation, sum
CACHE_OPS = 2  # DynamicCache.update: concatenate K and V
REPEAT_OPS = 2  # repeat_kv: K and V are written out for all query heads
ROUTING_OPS = 9  # softmax, top-k, sum, divide, cast, one-hot (3), zeros for the result
EXPERT_OPS = 9  # where, two index selects, silu, product, weighting, cast, index_add; slice of the mask
RESIDUAL_OPS = 1


@dataclass(frozen=True)
class EagerCosts:
    """Stated costs, seconds. None is measured on the A100 of the tables; `sources` in the file's header names them."""

    op_s: float = 10e-6  # host time of one eager operation
    linear4bit_s: float = 55e-6  # host time of one Linear4bit call with more than one row
    dequantise_slowdown: float = (1.36 * 2.07) ** 0.5  # NF4 kernel before September 2025
    block: int = 64  # weights per 32-bit scale


SOURCES = {
    "op_s": "parameter; 5-25 us of host work an operation by secondary sources",
    "linear4bit_s": "bitsandbytes issue 605: median 55 us at batch 32 (nn.Linear: 14 us), on an RTX 4090's host",
    "dequantise_slowdown": "bitsandbytes pull request 1747: NF4 kernel 1.36-2.07 times faster on P100, A100 "
    "and H100, September 2025; geometric mean, the improved kernel taken as memory traffic at 0.8 of the bandwidth",
    "operations": "counted in transformers' modeling_mixtral.py 4.4x",
}


class _Engine:
    """GPU and host seconds of the parts of one layer, by number of tokens."""

    def __init__(self, gemm: pd.DataFrame, memory: Memory, costs: EagerCosts) -> None:
        self.gemm, self.memory, self.costs = gemm, memory, costs

    def linear(self, n: int, k: int) -> pd.Series:
        """GPU time of a Linear4bit [m, k] x [k, n]: weights written out as 16 bits, then the GEMM."""
        traffic = n * k * (0.5 + 4 / self.costs.block + 2)
        dequantise = self.memory.seconds(traffic) * self.costs.dequantise_slowdown
        return gemm_seconds(self.gemm, n, k) + dequantise

    def slower(self, gpu: pd.Series, linears: int, ops: int) -> pd.Series:
        """The longer of GPU time and host time: the host cannot run ahead, since every expert waits for its indices."""
        return gpu.clip(lower=linears * self.costs.linear4bit_s + ops * self.costs.op_s)


def model_eager_4bit(
    source: str | Path,
    *,
    shape: ModelShape,
    gpu: str = "a100_sxm",
    dense: str = "sglang",
    attention: str = "vllm",
    moe: str = "sglang",
    moe_dtype: str = "int4_wo",
    name: str | None = None,
    costs: EagerCosts | None = None,
) -> Timings:
    """A modelled timing trace (`expert_mode` separate) of `shape` on a 4-bit Hugging Face engine.

    Arguments as in `import_aiconfigurator`; the MoE table is not used but for the device's name. An expert's time is a
    wait for the indices of its tokens (two operations) plus the longer of its GPU and its host time.
    """
    costs = costs or EagerCosts()
    base = import_aiconfigurator(
        source, shape=shape, gpu=gpu, dense=dense, attention=attention, moe=moe, moe_dtype=moe_dtype
    )
    tables = Tables(source, gpu)
    gemm, _ = tables.read("gemm", dense, gemm_dtype="bfloat16")
    memory = Memory(tables.system)
    gpu_limits = Gpu(memory.peak, float(tables.system["gpu"]["bfloat16_tc_flops"]))
    engine = _Engine(gemm, memory, costs)
    hidden, inter, width = shape.hidden, shape.inter, shape.qkv_width
    kv, q = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    rows = gemm_seconds(gemm, hidden, hidden).index

    def elementwise(ops: int, bytes_per_row: float) -> pd.Series:
        return ops * memory.by_rows(rows, bytes_per_row)

    norm = elementwise(NORM_OPS, 2 * 4 * hidden)  # most of them read and write 32-bit rows
    qkv = engine.linear(q, hidden) + 2 * engine.linear(kv, hidden)
    pre = engine.slower(norm + qkv + elementwise(ROTARY_OPS, 2 * width), 3, NORM_OPS + ROTARY_OPS)
    out = engine.linear(hidden, q) + engine.linear(shape.experts, hidden)
    post_ops = 2 * RESIDUAL_OPS + NORM_OPS + ROUTING_OPS
    routing = elementwise(ROUTING_OPS, 4 * shape.experts)
    post = engine.slower(out + norm + elementwise(2 * RESIDUAL_OPS, 3 * 2 * hidden) + routing, 2, post_ops)
    mlp = 2 * engine.linear(inter, hidden) + engine.linear(hidden, inter) + elementwise(2, 3 * 2 * inter)
    expert = 2 * costs.op_s + engine.slower(mlp + elementwise(EXPERT_OPS - 2, 2 * 2 * hidden), 3, EXPERT_OPS)

    def attention_point(point: Point) -> Point:
        # The cache is copied by its concatenation, then read and written once per group of query heads.
        context = point.context or 0
        cached = (context + 1) * point.tokens if point.step == "attention_decode" else context + point.tokens
        traffic = cached * 2 * kv * 2 * (2 + 1 + shape.heads // shape.kv_heads)
        host = (CACHE_OPS + REPEAT_OPS + 1) * costs.op_s
        return point._replace(seconds=max(point.seconds + memory.seconds(traffic), host), source="modelled")

    points = [attention_point(point) for point in base.points if point.step.startswith("attention")]
    points += [point for point in base.points if point.step == "head"]
    sizes = sorted({point.tokens for point in base.points if point.step == "dense_pre"})
    for step, curve in (("dense_pre", pre), ("dense_post", post), ("expert", expert)):
        points += [Point(step, m, None, float(curve[m]), source="modelled") for m in sizes if m in curve.index]
    return replace(
        base,
        points=tuple(points),
        name=name or f"{gpu}-{shape.name}-4bit-hf",
        source="modelled",
        dtype="weights nf4, computed in 16 bits; LM head 16 bits",
        framework=f"model of transformers 4.4x with bitsandbytes; GEMM {dense}, attention {attention} (measured)",
        provenance=f"tools/eager_4bit.py, from NVIDIA aiconfigurator's tables for {gpu}; see docs/timing_traces.md",
        expert_mode="separate",
        experts_base_s=2 * costs.op_s,
        launch_s=costs.op_s,
        launches_per_expert=3 * 2 + EXPERT_OPS,
        least_s={**least_seconds(shape, gpu_limits, *2 * [("nf4", gpu_limits.flops)]), "head": base.least_s["head"]},
        weights_bytes=shape.weights_bytes("nf4", "nf4") + round(2 * shape.vocab * hidden * (2 - WEIGHT_BYTES["nf4"])),
        conditions={"costs": ", ".join(f"{key} = {value:.4g}" for key, value in asdict(costs).items())},
        modelled={
            **{key: base.modelled[key] for key in ("host_s", "suspend_s, resume_s", "attention_prefill")},
            "dense_pre, dense_post, expert": "the longer of GPU time (weights written out as 16 bits, measured GEMMs, "
            "element-wise operations as memory traffic) and host time (operations counted)",
            "attention": "measured kernels plus copies of the cache (concatenation, repeated heads)",
            "experts_base_s": "two operations: the zeroed result and its reshape",
            **SOURCES,
        },
    )
