"""Attention steps of multi-head latent attention (DeepSeek-V2 and -V3) from aiconfigurator's tables."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qllm.traces.step_times.aiconfigurator.points import decode_points, prefill_points
from qllm.traces.step_times.aiconfigurator.tables import Memory, Tables, gemm_seconds, series
from qllm.traces.step_times.file_format import Point
from qllm.traces.step_times.model_shapes import ModelShape


def latent_points(
    tables: Tables, choice: str, shape: ModelShape, gemm: pd.DataFrame, memory: Memory, weight_bytes: float
) -> tuple[list[Point], str, int]:
    """(Points of both attention steps, FRAMEWORK:VERSION, how many were faster than the memory).

    Decode works on the latent values as they are kept: its kernel, and the products of each head that take the queries
    to them and the results back. Prefill first makes K and V of them, new and cached ones, in one GEMM.
    """
    wanted = {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": shape.heads}
    context, _ = tables.read("context_mla", choice, **wanted, batch_size=1, step=0)
    generation, name = tables.read("generation_mla", choice, **wanted)
    kept = shape.latent_kv * 2 / memory.peak

    def least(batch: float, context: float) -> float:
        return batch * kept * context

    decode = decode_points(generation, "imported", least)
    floored = sum(point.seconds == least(point.tokens, point.context or 0) for point in decode)
    prefill = prefill_points(series(context, "isl"), decode, "imported")
    absorbed = _absorbed(tables, choice, shape, memory)
    n, k = shape.latent_gemm
    expanded = gemm_seconds(gemm, n, k).clip(lower=n * k * weight_bytes / memory.peak)
    points = [point._replace(seconds=point.seconds + _at(absorbed, point.tokens)) for point in decode]
    points += [
        point._replace(seconds=point.seconds + _at(expanded, point.tokens + (point.context or 0))) for point in prefill
    ]
    return points, name, floored


def _absorbed(tables: Tables, choice: str, shape: ModelShape, memory: Memory) -> pd.Series:
    """Seconds of the products before and after decode's kernel, by sequences; at least their weights' bytes."""
    rank = shape.latent_gemm[1]
    parts = []
    for step, width in (("mla_gen_pre", shape.head_dim), ("mla_gen_post", shape.head_value)):
        rows, _ = tables.read("mla_bmm", choice, bmm_dtype="bfloat16", num_heads=shape.heads, op_name=step)
        parts.append(series(rows, "num_tokens").clip(lower=shape.heads * rank * width * 2 / memory.peak))
    return parts[0].add(parts[1]).dropna()


def _at(curve: pd.Series, tokens: int) -> float:
    """Seconds between the curve's sizes on a line, beyond them in proportion."""
    last = float(curve.index[-1])
    if tokens > last:
        return float(curve.iloc[-1]) * tokens / last
    return float(np.interp(tokens, curve.index.to_numpy(dtype=float), curve.to_numpy(dtype=float)))
