"""A timing trace from a GPU's data sheet and a model's shape, where nothing has been measured.

A kernel takes the longer of moving its bytes and doing its arithmetic, each at a stated share of what the data sheet
says, and a constant more. The shares are parameters (`Costs`); tools/check_roofline.py prints how far the result is
from imported traces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from qllm.traces import import_defaults as defaults
from qllm.traces.messages import suggestion
from qllm.traces.step_times.data_sheet import Gpu
from qllm.traces.step_times.file_format import Point, TimingError
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape
from qllm.traces.step_times.roofline import TOO_LARGE, least_seconds
from qllm.traces.step_times.timings import Timings

TOKENS = tuple(sorted({1 << i for i in range(16)} | {3 << i for i in range(14)}))  # 1, 2, 3, 4, 6, ... 32768
DECODE_BATCHES = tuple(1 << i for i in range(11))
CONTEXTS = tuple(1 << i for i in range(8, 17))
HEAD_ROWS = 2048
VALUE_BYTES = 2  # of activations and KV


@dataclass(frozen=True)
class Costs:
    """What a data sheet leaves open; SOURCES says where each default comes from.

    Raises:
        TimingError: A share is not above 0 and at most 1, or a time is below 0.
    """

    memory_efficiency: float = defaults.MEMORY_EFFICIENCY  # of the bandwidth
    gemm_efficiency: float = defaults.GEMM_EFFICIENCY  # of the peak
    expert_efficiency: float = defaults.EXPERT_EFFICIENCY  # of the peak, in a fused MoE kernel
    attention_efficiency: float = defaults.ATTENTION_EFFICIENCY  # of the 16-bit peak, of prefill
    kernel_s: float = defaults.KERNEL_S  # that a kernel takes beside its work
    attention_s: float = defaults.ATTENTION_S  # the same of an attention kernel
    experts_base_s: float = defaults.EXPERTS_BASE_S  # the same of the fused MoE kernels of a layer
    launch_s: float = defaults.LAUNCH_S
    host_s: float = defaults.HOST_S

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            share = name.endswith("_efficiency")
            if not (0 < value <= 1 if share else 0 <= value < math.inf):
                allowed = "above 0 and at most 1" if share else "at least 0 seconds"
                raise TimingError(f"{name} is {value!r}, must be {allowed}")


_A100 = "what suits the two imported A100 traces best (tools/check_roofline.py --fit); not fitted to other GPUs"
SOURCES = {
    "memory_efficiency, kernel_s": "aiconfigurator's own 0.8 of the bandwidth and 3 us a kernel",
    "gemm_efficiency, expert_efficiency, attention_efficiency, attention_s, experts_base_s": _A100,
    "launch_s": "parameter, about 5 us a launch by secondary sources",
    "host_s": "parameter, no measurement",
}


class _Roofline:
    """Seconds of the kernels of one model on one GPU."""

    def __init__(self, shape: ModelShape, gpu: Gpu, expert_dtype: str, other_dtype: str, costs: Costs) -> None:
        self.shape, self.costs = shape, costs
        self.bandwidth = gpu.bandwidth * costs.memory_efficiency
        self.expert_bytes, self.other_bytes = WEIGHT_BYTES[expert_dtype], WEIGHT_BYTES[other_dtype]
        self.gemm_flops = peak(gpu, other_dtype) * costs.gemm_efficiency
        self.expert_flops = peak(gpu, expert_dtype) * costs.expert_efficiency
        self.attention_flops = gpu.flops * costs.attention_efficiency

    def moved(self, size: float) -> float:
        """A kernel that only moves bytes."""
        return size / self.bandwidth + self.costs.kernel_s

    def gemm(self, m: float, n: int, k: int) -> float:
        size = n * k * self.other_bytes + m * (n + k) * VALUE_BYTES
        return max(size / self.bandwidth, 2.0 * m * n * k / self.gemm_flops) + self.costs.kernel_s

    def dense(self, step: str, m: int) -> float:
        """dense_pre, dense_post or head: its GEMMs, and norm, rotary embedding, KV write, activation or sampling."""
        shape = self.shape
        seconds = sum(self.gemm(m, n, k) for n, k in shape.gemms()[step])
        seconds += self.moved(4 * m * shape.hidden * VALUE_BYTES)  # a norm with residual reads and writes two rows
        if step == "dense_pre":
            seconds += self.moved(2 * m * shape.qkv_width * VALUE_BYTES)
        elif step == "head":
            seconds += self.moved(m * shape.vocab * (2 + 4 + 4))
        elif shape.shared_inter:
            seconds += self.moved(3 * m * shape.shared_inter * VALUE_BYTES)
        return seconds

    def expert(self, m: int) -> float:
        """f(m): one expert's weights read once, or the arithmetic of its tokens."""
        shape = self.shape
        size = shape.expert_weights * self.expert_bytes + m * (2 * shape.hidden + 3 * shape.inter) * VALUE_BYTES
        return max(size / self.bandwidth, 2.0 * m * shape.expert_weights / self.expert_flops)

    def prefill(self, n: int, context: int) -> float:
        """n new tokens of a sequence over `context` cached ones, the mean of layers with and without a window."""
        shape = self.shape
        flops = 2.0 * shape.heads * (shape.key_dim + shape.head_value)
        width = shape.heads * (shape.key_dim + shape.head_value)

        def kernel(window: int) -> float:
            pairs = seen(context + n, window) - seen(context, window)
            read = n + (min(context, window) if window else context)
            size = n * width * VALUE_BYTES + read * self._kv_row()
            return max(size / self.bandwidth, flops * pairs / self.attention_flops) + self.costs.attention_s

        return self._mean(kernel) + (self.gemm(context + n, *shape.latent_gemm) if shape.latent_kv else 0.0)

    def _kv_row(self) -> float:
        """Bytes of K and V that the attention of a layer reads for a token of a prompt: of all heads, if latent."""
        shape = self.shape
        if shape.latent_kv:
            return shape.heads * (shape.key_dim + shape.head_value) * VALUE_BYTES
        return shape.kv_bytes_per_layer(VALUE_BYTES)

    def decode(self, batch: int, context: int) -> float:
        """One new token each of `batch` sequences over `context` cached ones."""
        shape = self.shape
        kept = shape.kv_bytes_per_layer(VALUE_BYTES)
        flops, rank = 2.0 * shape.heads * (shape.key_dim + shape.head_value), 0
        if shape.latent_kv:
            rank = shape.latent_gemm[1]
            flops = 2.0 * shape.heads * (shape.latent_kv + rank)

        def kernel(window: int) -> float:
            tokens = batch * (min(context + 1, window) if window else context + 1)
            return max(tokens * kept / self.bandwidth, flops * tokens / self.attention_flops) + self.costs.attention_s

        absorbed = sum(
            max(
                shape.heads * rank * width * VALUE_BYTES / self.bandwidth,
                2.0 * batch * shape.heads * rank * width / self.gemm_flops,
            )
            + self.costs.kernel_s
            for width in ((shape.head_dim, shape.head_value) if rank else ())
        )
        return self._mean(kernel) + absorbed

    def _mean(self, kernel: Callable[[int], float]) -> float:
        """The mean over layers of `kernel`, which is told a layer's window (0: none)."""
        share = self.shape.window_layers / self.shape.layers
        return (1 - share) * kernel(0) + (share * kernel(self.shape.window) if share else 0.0)


def peak(gpu: Gpu, dtype: str) -> float:
    """Operations a second of a GPU with weights of a type: those in 4 bits (nvfp4 apart) are made 16-bit numbers."""
    bits = {"fp8": 8, "int8": 8, "nvfp4": 4}.get(dtype, 16)
    return gpu.peak(bits)


def seen(tokens: int, window: int) -> float:
    """Pairs of a token and one that it sees, in a prompt of so many, if each sees at most `window` (0: all)."""
    if not window or tokens <= window:
        return tokens * tokens / 2
    return window * window / 2 + window * (tokens - window)


def roofline_timings(
    shape: ModelShape,
    gpu: Gpu,
    *,
    dtype: str = "bf16",
    other_dtype: str | None = None,
    costs: Costs | None = None,
    name: str | None = None,
) -> Timings:
    """A modelled timing trace.

    Args:
        shape: Sizes of the model.
        gpu: Its data sheet says bandwidth, operations, memory and the way to the host.
        dtype: Type of the experts' weights, a key of WEIGHT_BYTES.
        other_dtype: That of all other weights; default: fp8 where the experts' is, else bf16.
        costs: What the data sheet leaves open.
        name: Of the trace; default: made from GPU, model and type.

    Raises:
        TimingError: A type is unknown, or the data sheet lacks memory or bandwidth.
    """
    other = other_dtype or (dtype if WEIGHT_BYTES.get(dtype, 0) >= 1 else "bf16")
    for key, kind in (("dtype", dtype), ("other_dtype", other)):
        if kind not in WEIGHT_BYTES:
            raise TimingError(f"{key}: unknown type of weights {kind!r:.40}; {suggestion(kind, WEIGHT_BYTES)}")
    for key in ("bandwidth", "flops", "memory", "host_bandwidth"):
        if not 0 < getattr(gpu, key) < math.inf:
            raise TimingError(f"{key} of the GPU is {getattr(gpu, key)!r}, must be above 0")
    costs = costs or Costs()
    model = _Roofline(shape, gpu, dtype, other, costs)
    points = [Point(step, m, None, model.dense(step, m)) for step in ("dense_pre", "dense_post") for m in TOKENS]
    points += [Point("head", m, None, model.dense("head", m)) for m in TOKENS if m <= HEAD_ROWS]
    points += [Point("expert", m, None, model.expert(m)) for m in TOKENS]
    points += [Point("attention_prefill", n, c, model.prefill(n, c)) for n in TOKENS for c in (0, *CONTEXTS)]
    points += [Point("attention_decode", b, c, model.decode(b, c)) for b in DECODE_BATCHES for c in (1, *CONTEXTS)]
    weights = shape.weights_bytes(dtype, other)
    too_large = f". {TOO_LARGE}" if weights > gpu.memory else ""
    device = gpu.device or "a GPU of these numbers"
    return Timings(
        points=tuple(point._replace(seconds=float(f"{point.seconds:.6g}"), source="modelled") for point in points),
        name=name or f"{device}-{shape.name}-{dtype}",
        source="modelled",
        device=device,
        model=shape.name,
        dtype=f"experts {dtype}, the rest {other}",
        framework="none: data sheet and stated shares of it",
        date="not measured",
        licence="Apache-2.0",
        provenance=f"step_times/modelled.py; see docs/timing_traces.md{too_large}",
        layers=shape.layers,
        hidden=shape.hidden,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_mode="fused",
        experts_base_s=costs.experts_base_s,
        launch_s=costs.launch_s,
        launches_per_expert=3,
        host_s=costs.host_s,
        suspend_s=2 * costs.launch_s,
        resume_s=costs.launch_s,
        kv_bytes_per_token=shape.kv_bytes_per_token(VALUE_BYTES),
        sequence_bytes=shape.sequence_bytes(VALUE_BYTES),
        weights_bytes=weights,
        memory_bytes=gpu.memory,
        host_bandwidth=gpu.host_bandwidth,
        max_context=shape.max_context or None,
        least_s=least_seconds(shape, gpu, (dtype, peak(gpu, dtype)), (other, peak(gpu, other))),
        conditions={
            "data_sheet": f"{gpu.bandwidth:g} bytes/s, {gpu.flops:g} operations/s in 16 bits, {gpu.peak(8):g} in 8, "
            f"{gpu.peak(4):g} in 4",
            **{f.name: getattr(costs, f.name) for f in fields(costs)},
        },
        modelled={"all": "bytes / (share x bandwidth) or operations / (share x peak), whichever is longer", **SOURCES},
    )
