"""What a GPU needs at least for the steps of a pass (the roofline of Williams, Waterman and Patterson, 2009).

A step takes the longer of reading its weights or its KV cache (bytes / bandwidth of the memory) and of its arithmetic
(2 operations a weight and token / peak of the tensor cores). What a timing trace holds is compared with that: what is
faster is no measurement of this work, and what is a thousand times slower is in other units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qllm.traces.step_times.data_sheet import Gpu, gpu_named
from qllm.traces.step_times.file_format import Point, TimingHeader
from qllm.traces.step_times.interpolate import by_tokens
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape

FASTER = 0.95  # of the least: what clocks and rounding may make of it
SLOWER = 50.0  # times the least in every row: no kernel is that bad, milliseconds in place of seconds are 1,000
SLOW_MACHINE = 1e10, 2e10  # bytes and operations a second of the least that a model may run on


TOO_LARGE = "The weights do not fit in one such GPU: step times of its layers, for what-if questions alone"
_UNITS = (  # header key, values that its unit (seconds, bytes per second) makes impossible
    ("launch_s", lambda value: value > 0.1),
    ("experts_base_s", lambda value: value > 10),
    ("host_s", lambda value: value > 10),
    ("suspend_s", lambda value: value > 10),
    ("resume_s", lambda value: value > 10),
    ("host_bandwidth", lambda value: not 1e6 < value < 1e13),
)


def least_seconds(
    shape: ModelShape, gpu: Gpu, experts: tuple[str, float], dense: tuple[str, float]
) -> dict[str, list[float]]:
    """The header's `least_s` of a model: for each step seconds whatever its size, and for each unit of `units`.

    `experts` and `dense`: the type of their weights (a key of WEIGHT_BYTES), and operations a second.
    """
    full = 1 - shape.window_layers / shape.layers
    weights = {step: sum(n * k for n, k in gemms) for step, gemms in shape.gemms().items()}
    weights["expert"] = shape.expert_weights
    least = {}
    for step in ("dense_pre", "dense_post", "expert", "head"):
        kind, flops = experts if step == "expert" else dense
        least[step] = [weights[step] * WEIGHT_BYTES[kind] / gpu.bandwidth, 2 * weights[step] / flops]
    kv = shape.kv_bytes_per_layer() / gpu.bandwidth
    fixed = 0.0
    if shape.latent_kv:  # decode works on what is kept, prefill on the K and V that one GEMM makes of it
        n, k = shape.latent_gemm
        fixed = n * k * WEIGHT_BYTES[dense[0]] / gpu.bandwidth
        kv = max(kv, 2 * shape.heads * (shape.latent_kv + k) / gpu.flops)
    pair = 2 * shape.heads * (shape.key_dim + shape.head_value)
    least["attention_decode"] = [fixed, full * kv]
    least["attention_prefill"] = [fixed, full * pair / gpu.flops]
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
    bandwidth, flops = gpu[:2] if gpu else SLOW_MACHINE
    times = took / (read / bandwidth + work / 2 / flops)
    if header.source != "modelled" and took > 1 and times > SLOWER:
        return [f"{what}, {times:.0f} times what is needed; is it in milliseconds?"]
    return []


_PASS = ("dense_pre", "dense_post", "expert", "head")
