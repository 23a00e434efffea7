"""Made-up timing traces for tests and examples: no device behaves like that."""

from __future__ import annotations

from typing import Any

from qllm.traces.step_times.file_format import Point
from qllm.traces.step_times.timings import Timings


def affine_timings(
    *,
    dense_pre: tuple[float, float] = (20e-6, 1e-6),
    dense_post: tuple[float, float] = (20e-6, 1e-6),
    expert: tuple[float, float] = (50e-6, 1e-6),
    head: tuple[float, float] = (50e-6, 1e-6),
    prefill: tuple[float, float, float] = (10e-6, 0.5e-6, 1e-10),
    decode: tuple[float, float, float] = (10e-6, 0.5e-6, 1e-9),
    launch: tuple[float, float] | None = None,
    after_prefill: tuple[float, float] | None = None,
    tokens: int = 65536,
    context: int = 131072,
    **header: Any,
) -> Timings:
    """A timing trace of straight lines, up to `tokens` and `context`; `header`: its keys, such as layers, top_k.

    Each step: (seconds at any size, seconds per token, for attention also per token and context token). None: no such
    curve.
    """
    points = []
    curves = {"dense_pre": dense_pre, "dense_post": dense_post, "expert": expert, "head": head}
    for step, line in {**curves, "launch": launch, "after_prefill": after_prefill}.items():
        if line is not None:
            points += [Point(step, n, None, line[0] + line[1] * n, source="modelled") for n in (1, tokens)]
    for step, (base, slope, cross) in {"attention_prefill": prefill, "attention_decode": decode}.items():
        for n in (1, tokens):
            points += [Point(step, n, c, base + slope * n + cross * n * c, source="modelled") for c in (0, context)]
    defaults: dict[str, Any] = {
        **{"name": "affine", "source": "modelled", "device": "none", "model": "none", "dtype": "none"},
        **{"framework": "none", "date": "none", "licence": "Apache-2.0", "provenance": "made up, for tests"},
        **{"layers": 2, "hidden": 64, "experts": 4, "top_k": 2, "expert_mode": "fused", "experts_base_s": 30e-6},
        **{"launch_s": 5e-6, "launches_per_expert": 3, "host_s": 0.0, "suspend_s": 0.0, "resume_s": 0.0},
        **{"kv_bytes_per_token": 1024, "weights_bytes": 1 << 30, "memory_bytes": 8 << 30, "host_bandwidth": 32e9},
    }
    return Timings(points=tuple(points), **{**defaults, **header})
