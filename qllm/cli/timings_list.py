"""The rows of `qllm timings list`."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.file_format import Point
from qllm.traces.step_times.interpolate import ExtrapolationWarning
from qllm.traces.step_times.roofline import least_of
from qllm.traces.step_times.timings import Timings, TimingWarning, bundled_timings

#: what a trace is compared with the roofline by: 32 sequences that decode over 1,024 tokens, a prompt of 2,048
DECODE, CONTEXT, PROMPT = 32, 1024, 2048


def rows(gpu: str | None = None, model: str | None = None) -> list[dict[str, Any]]:
    """What ships, a mapping each; `gpu` and `model`: parts of the names that are meant."""
    found = []
    for name in bundled_timings():
        if (gpu or "").lower() not in name.split("-")[0] or (model or "").lower() not in name:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TimingWarning)
            warnings.simplefilter("ignore", ExtrapolationWarning)
            timings = Timings.load(name)
            decode, prefill = over_roofline(timings)
        found.append(
            {
                "name": name,
                "gpu": timings.device,
                "model": timings.model,
                "dtype": timings.dtype,
                "source": timings.source,
                "decode_over_roofline": decode,
                "prefill_over_roofline": prefill,
                "weights_gb": round(timings.weights_bytes / 1e9, 1),
                "memory_gb": round(timings.memory_bytes / 1e9, 1),
                "fits": timings.weights_bytes <= timings.memory_bytes,
            }
        )
    return found


def over_roofline(timings: Timings) -> tuple[float | None, float | None]:
    """Seconds / least seconds of a pass that decodes and of a prompt, without the host; None where no least is told."""
    if not timings.least_s:
        return None, None
    return _over(timings, 0, DECODE), _over(timings, PROMPT, 0)


def _over(timings: Timings, prompt: int, decode: int) -> float:
    steps, tokens = PassCostModel(timings), prompt + decode
    cost = steps.cost([(None, prompt, 0)] if prompt else [], decode, decode * CONTEXT, decode + (prompt > 0))
    share, rest = divmod(tokens * timings.top_k, timings.experts)
    counts = np.array([share + 1] * rest + [share] * (timings.experts - rest))
    took = steps.total(cost, timings.layers * float(steps.experts(counts).sum())) - cost.prologue_s

    def least(step: str, size: int, context: int | None = None) -> float:
        return least_of(timings.least_s, Point(step, size, context, 0.0))

    layer = least("dense_pre", tokens) + least("dense_post", tokens)
    layer += sum(least("expert", int(m)) for m in counts if m)
    layer += least("attention_decode", decode, CONTEXT) if decode else least("attention_prefill", prompt, 0)
    return round(took / (timings.layers * layer + least("head", decode or 1)), 2)
