"""What `gpu.py` is to find out: figures with their goals on an NVIDIA H200, by part, in order of importance."""

from __future__ import annotations

from dataclasses import dataclass

JUDGED = "H200"  # the device that goals are for ...
LAYERS = 48  # ... and the layers
MINUTES = 6.0  # that shares are of


@dataclass(frozen=True)
class Figure:
    """A number that a part gives. `goal`: at most that, or, with `least`, at least; None: for information."""

    name: str
    title: str
    unit: str = ""
    goal: float | None = None
    least: bool = False
    by_layer: bool = False  #: it grows with the layers

    def goal_for(self, layers: int) -> float | None:
        """The goal of a model with fewer layers."""
        return None if self.goal is None else self.goal * (layers / LAYERS if self.by_layer else 1)

    def reached(self, value: float, goal: float) -> bool:
        return value >= goal if self.least else value <= goal


@dataclass(frozen=True)
class Part:
    """A function of `gpu_parts`: seconds of MINUTES that it may take, and that it needs to begin."""

    name: str
    share: float
    needs: float
    figures: tuple[Figure, ...]


def _part(name: str, share: float, needs: float, *figures: Figure) -> Part:
    return Part(name, share, needs, figures)


F = Figure
PARTS = (
    _part("build", 150, 0, F("build_s", "making the model", "s"), F("engine_s", "starting the engine", "s")),
    _part(
        *("passes", 15, 3),
        F("decode_1", "decode of 1 over 512 tokens", "ms", 8, by_layer=True),
        F("decode_32", "decode of 32 over 512 tokens", "ms", 18, by_layer=True),
        F("prefill_128", "prefill of 128", "ms", 19, by_layer=True),
    ),
    _part("ttft", 6, 2, F("ls_ttft", "LS TTFT alone, 128 tokens", "ms", 22, by_layer=True)),
    _part("prefill", 12, 4, F("prefill_8192_2ms", "prefill of 8,192, steps to 2 ms", "ms", 290, by_layer=True)),
    _part("transformers", 6, 3, F("prefill_8192_transformers", "prefill of 8,192, transformers", "ms")),
    _part("blocking", 15, 5, F("blocking_8192", "blocking p99, BE pass of 8,192", "ms", 3)),
    _part(
        *("mixed_qllm", 30, 10),
        F("ls_p99_qllm", "LS TTFT p99 / alone, qllm", "ratio", 1.25),
        F("blocking_p99_qllm", "blocking p99 in that load", "ms"),
    ),
    _part(
        *("bits", 25, 5),
        F("differing_bits", "logits that suspensions changed", "", 0),
        F("suspensions", "suspensions", "", 1000, least=True),
    ),
    _part("points", 8, 3, F("points_on_off", "points on / off, decode of 32", "ratio", 1.02)),
    _part(
        *("host", 5, 2),
        F("host_ms", "host's work for a decode of 32", "ms", 1, by_layer=True),
        F("host_launch_ms", "of it until the last launch", "ms"),
        F("host_sample_ms", "of it for sampling", "ms"),
    ),
    _part(
        *("kv", 6, 2),
        F("kv_to_host", "KV to host memory", "GB/s", 40, least=True),
        F("kv_back", "KV back", "GB/s", 40, least=True),
    ),
    _part(
        *("throughput", 40, 20),
        F("tokens_per_s", "64 prompts of 256, 128 new each", "tokens/s"),
        F("tokens_per_s_transformers", "the same, transformers", "tokens/s"),
        F("tokens_per_s_ratio", "ratio of the two", "ratio", 2, least=True),
    ),
    _part("prefill_5ms", 10, 4, F("prefill_8192_5ms", "prefill of 8,192, steps to 5 ms", "ms", 260, by_layer=True)),
    _part("blocking_long", 20, 8, F("blocking_32768", "blocking p99, BE pass of 32,768", "ms", 5)),
    _part(
        *("mixed_hybrid", 40, 15),
        F("ls_p99_hybrid", "LS TTFT p99 / alone, hybrid", "ratio", 1.25),
        F("blocking_p99_hybrid", "blocking p99 in that load", "ms"),
    ),
    _part(
        *("launches", 5, 3),
        F("kernels_a_layer", "kernels a layer, decode of 32"),
        F("launches_a_pass", "launches of the host, same pass"),
    ),
    _part(
        *("families", 45, 10),
        F("families_wrong", "families with other tokens", "", 0),
        F("families_tried", "families tried"),
    ),
    _part(
        *("calibration", 125, 20),
        F("calibrate_s", "qllm calibrate of 2 layers", "s", 120),
        F("calibrate_wide", "kinds that scatter above 10 %", "", 10),
    ),
)
