"""What the header of an imported trace says of how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qllm.traces.step_times.aiconfigurator.tables import Tables
from qllm.traces.step_times.model_shapes import ModelShape

# Keys of `modelled` and `conditions`: what an import made of the rows, and which it took.
NOTES = (
    *("faster than the memory", "sliding window", "of several kernels", "latent attention", "dense layers"),
    "fastest in the mean only",
)


def kernels_note(tables: Tables, names: Iterable[str]) -> dict[str, str]:
    """Of kernels that were measured at the same sizes: which was taken. `names`: FRAMEWORK:VERSION:KERNEL."""
    lines = [f"{name}, not {', '.join(tables.passed_over[name])}" for name in names if name in tables.passed_over]
    return {NOTES[2]: "; ".join(lines)} if lines else {}


def shape_notes(shape: ModelShape, floored: Mapping[str, int]) -> dict[str, str]:
    """Of rows below the roofline, and of layers that are not like the others."""
    notes = {}
    if any(floored.values()):
        rows = ", ".join(f"{count} of {step}" for step, count in floored.items() if count)
        notes[NOTES[0]] = (
            f"rows whose weights or KV had stayed in the L2 cache take bytes / bandwidth (source = modelled): {rows}"
        )
    if shape.window_layers:
        notes[NOTES[1]] = (
            f"attention is the mean over {shape.layers} layers, of which {shape.window_layers} see the last "
            f"{shape.window} tokens, which sequence_bytes holds"
        )
    if shape.latent_kv:
        notes[NOTES[3]] = (
            f"{shape.latent_kv} values kept per token and layer; prefill makes K and V of new and cached ones in a "
            "GEMM, decode works on them as they are, with a product of each head before and after"
        )
    if shape.dense_layers:
        notes[NOTES[4]] = (
            f"{shape.dense_layers} of {shape.layers} layers have no experts in the model; here all have, and "
            "weights_bytes counts them as they are"
        )
    return notes
