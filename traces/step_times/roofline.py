"""What a GPU needs at least for the steps of a pass (the roofline of Williams, Waterman and Patterson, 2009).

A step takes the longer of reading its weights or its KV cache (bytes / bandwidth of the memory) and of its arithmetic
(2 operations a weight and token / peak of the tensor cores). What a timing trace holds is compared with that: what is
faster is no measurement of this work, and what is a thousand times slower is in other units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qllm.traces.step_times.file_format import Point, TimingHeader
from qllm.traces.step_times.interpolate import by_tokens
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape

FASTER = 0.95  # of the least: what clocks and rounding may make of it
SLOWER = 50.0  # times the least in every row: no kernel is that bad, milliseconds in place of seconds are 1,000
SLOW_MACHINE = 1e10, 2e10  # bytes and operations a second of the least that a model may run on


class Gpu(NamedTuple):
    """Of one GPU: bytes a second of its memory, and operations a second of 16-bit numbers, dense, by the data sheet."""

    bandwidth: float
    flops: float


# NVIDIA's data sheets: V100 (2018), T4, A100 (2021), A10, A30, L4, L40S, H100 (2023), H200, B200 and GB200 (DGX), RTX
# (Ada and Blackwell architecture papers); AMD's data sheets: MI250X, MI300X, MI325X. Keys are parts of a device's name;
# of several with one name (memory of 40 or 80 GB, PCIe or SXM) the fastest.
GPUS = {
    "V100": Gpu(0.9e12, 125e12),
    "T4": Gpu(0.32e12, 65e12),
    "A10": Gpu(0.6e12, 125e12),
    "A30": Gpu(0.933e12, 165e12),
    "A100": Gpu(2.039e12, 312e12),
    "L4": Gpu(0.3e12, 121e12),
    "L40": Gpu(0.864e12, 362e12),
    "H100": Gpu(3.35e12, 989e12),
    "H100 NVL": Gpu(3.9e12, 989e12),
    "GH200": Gpu(4.9e12, 989e12),
    "H200": Gpu(4.8e12, 989e12),
    **dict.fromkeys(("B200", "GB200", "B300", "GB300"), Gpu(8e12, 2.5e15)),
    "RTX 4090": Gpu(1.01e12, 330e12),
    "RTX 5090": Gpu(1.79e12, 420e12),
    "RTX 6000 Ada": Gpu(0.96e12, 364e12),
    "RTX PRO 6000": Gpu(1.792e12, 500e12),
    "MI250": Gpu(3.28e12, 383e12),
    "MI300X": Gpu(5.3e12, 1307e12),
    "MI325X": Gpu(6e12, 1307e12),
}

_UNITS = (  # header key, values that its unit (seconds, bytes per second) makes impossible
    ("launch_s", lambda value: value > 0.1),
    ("experts_base_s", lambda value: value > 10),
    ("host_s", lambda value: value > 10),
    ("suspend_s", lambda value: value > 10),
    ("resume_s", lambda value: value > 10),
    ("host_bandwidth", lambda value: not 1e6 < value < 1e13),
)


def gpu_named(device: str) -> Gpu | None:
    """The GPU of that name ("NVIDIA A100-SXM4-80GB"), by the longest key of GPUS in it."""
    found = [key for key in GPUS if re.search(rf"(?<![A-Z0-9]){key}(?![0-9])", device, re.IGNORECASE)]
    return GPUS[max(found, key=len)] if found else None


def least_seconds(
    shape: ModelShape, gpu: Gpu, experts: tuple[str, float], dense: tuple[str, float]
) -> dict[str, list[float]]:
    """The header's `least_s` of a model: for each step seconds whatever its size, and for each unit of `units`.

    `experts` and `dense`: the type of their weights (a key of WEIGHT_BYTES), and operations a second.
    """
    q, full = shape.heads * shape.head_dim, 1 - shape.window_layers / shape.layers
    weights = {
        "dense_pre": shape.hidden * shape.qkv_width,
        "dense_post": shape.hidden * (q + shape.experts + 3 * shape.shared_inter),
        "expert": shape.expert_weights,
        "head": shape.hidden * shape.vocab,
    }
    least = {}
    for step, count in weights.items():
        kind, flops = experts if step == "expert" else dense
        least[step] = [count * WEIGHT_BYTES[kind] / gpu.bandwidth, 2 * count / flops]
    kv = shape.kv_bytes_per_token() / shape.layers
    least["attention_decode"] = [0.0, full * kv / gpu.bandwidth]
    least["attention_prefill"] = [0.0, full * 4 * q / gpu.flops]
    return {step: [float(f"{value:.4g}") for value in values] for step, values in least.items()}


def least_of(least: Mapping[str, Sequence[float]], point: Point) -> float:
    """Seconds that a point's step takes at least; 0 where `least` does not say."""
    fixed, each = least.get(point.step, (0.0, 0.0))
    return max(fixed, each * _units(point))


def _units(point: Point) -> float:
    """Of the work of a step: tokens; for attention pairs of tokens."""
    context = point.context or 0
    if point.step == "attention_decode":
        return point.tokens * context
    return point.tokens * (context + point.tokens / 2) if point.step == "attention_prefill" else point.tokens


def times_least(header: TimingHeader, points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """The lowest and highest of seconds / least of each step, where the header says what the least is."""
    found: dict[str, tuple[float, float]] = {}
    for point in points:
        least = least_of(header.least_s, point)
        if least > 0:
            times = point.seconds / least
            low, high = found.get(point.step, (times, times))
            found[point.step] = min(low, times), max(high, times)
    return found


def implausible(header: TimingHeader, points: Sequence[Point]) -> list[str]:
    """What cannot be of a timing trace, a line each: steps against the roofline, sizes against the memory, units."""
    told = [str(line) for line in header.conditions.get("implausible", [])]
    if header.weights_bytes > header.memory_bytes:
        told.append(
            f"weights of {header.weights_bytes / 1e9:.1f} GB do not fit in {header.memory_bytes / 1e9:.1f} GB of memory"
        )
    for key, impossible in _UNITS:
        if impossible(getattr(header, key)):
            unit = "bytes per second" if key == "host_bandwidth" else "seconds"
            told.append(f"{key} is {getattr(header, key):g} {unit}: is it in another unit?")
    if not header.least_s:
        return told + _whole_pass(header, points)
    for step, (low, _) in times_least(header, points).items():
        mine = [point for point in points if point.step == step]
        if low > SLOWER:
            told.append(
                f"{step}: every row takes at least {low:.0f} times what {header.device} needs; is it in milliseconds?"
            )
        elif low < FASTER:
            worst = min(
                (point for point in mine if least_of(header.least_s, point)),
                key=lambda point: point.seconds / least_of(header.least_s, point),
            )
            told.append(
                f"{named(worst)} takes {1e6 * worst.seconds:.4g} us, which {header.device} cannot do in less than "
                f"{1e6 * least_of(header.least_s, worst):.4g} us"
            )
    return told


def named(point: Point) -> str:
    """A point in words: dense_pre at 16 tokens, attention_decode of 8 over 1023 tokens."""
    if point.context is None:
        return f"{point.step} at {point.tokens} token{'s' if point.tokens > 1 else ''}"
    return f"{point.step} of {point.tokens} over {point.context} tokens"


def _whole_pass(header: TimingHeader, points: Sequence[Point]) -> list[str]:
    """The same for a trace that does not say what its steps take at least: of a large pass, by its weights' bytes.

    Half of the weights may be embeddings, of which a pass reads little. The weights' type is not known: 4 bytes each
    make the least arithmetic.
    """
    gpu = gpu_named(header.device)
    sizes = {step: sorted((p.tokens, p.seconds) for p in points if p.step == step) for step in _PASS}
    tokens = min(sizes["dense_pre"][-1][0], sizes["dense_post"][-1][0])
    tokens = max(1, min(tokens, sizes["expert"][-1][0] * header.experts // header.top_k))

    def seconds(step: str, size: float) -> float:
        xs, ys = np.array(sizes[step], dtype=float).T
        return float(by_tokens(xs, ys, np.array(max(size, xs[0]))))

    busy = min(header.experts, tokens * header.top_k)
    layer = seconds("dense_pre", tokens) + seconds("dense_post", tokens) + header.experts_base_s
    layer += busy * seconds("expert", tokens * header.top_k / header.experts)
    took = header.layers * layer + seconds("head", 1)
    read = header.weights_bytes * busy / header.experts
    work = 2 * tokens * header.weights_bytes * header.top_k / header.experts
    what = f"a pass of {tokens} tokens takes {took:.4g} s"
    if gpu is not None and took < FASTER * max(read / 2 / gpu.bandwidth, work / 2 / 4 / gpu.flops):
        return [f"{what}, in which {header.device} cannot read half of the weights nor do the arithmetic"]
    bandwidth, flops = gpu or SLOW_MACHINE
    times = took / (read / bandwidth + work / 2 / flops)
    if header.source != "modelled" and took > 1 and times > SLOWER:
        return [f"{what}, {times:.0f} times what is needed; is it in milliseconds?"]
    return []


_PASS = ("dense_pre", "dense_post", "expert", "head")
