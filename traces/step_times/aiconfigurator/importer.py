"""NVIDIA's published kernel measurements (aiconfigurator, Apache-2.0) as a timing trace.

The tables hold GPU kernel time of GEMMs, attention and fused MoE layers. The rest is modelled (header: `modelled`):
norms, rotary embedding, sampling, cached prefixes, launches, the host. Formulas: docs/timing_traces.md.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from qllm.traces import import_defaults as defaults
from qllm.traces.step_times.aiconfigurator.kernels import FASTEST, Kernels
from qllm.traces.step_times.aiconfigurator.notes import NOTES, kernels_note, shape_notes
from qllm.traces.step_times.aiconfigurator.tables import DTYPES, LICENCE, Tables
from qllm.traces.step_times.expert_fit import OUTLIER
from qllm.traces.step_times.file_format import TimingError, TimingWarning
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape
from qllm.traces.step_times.roofline import TOO_LARGE
from qllm.traces.step_times.timings import Timings

_ALLOWED = f"allowed: {', '.join(WEIGHT_BYTES)}"


def _weights(given: str | None, dtype: str, what: str) -> str:
    """The type of weights, a key of WEIGHT_BYTES: as given, or that of the kernels."""
    if given is None and dtype in DTYPES:
        return DTYPES[dtype][0]
    if given is None:
        raise TimingError(f"{what} must be given, since the weights of {dtype!r} are not known; {_ALLOWED}")
    if given not in WEIGHT_BYTES:
        raise TimingError(f"{what}: unknown type of weights {given!r}; {_ALLOWED}")
    return given


def import_aiconfigurator(
    source: str | Path,
    *,
    shape: ModelShape,
    gpu: str = defaults.GPU,
    moe: str = defaults.KERNELS,
    moe_dtype: str = defaults.KERNEL_DTYPE,
    dense: str = defaults.KERNELS,
    gemm_dtype: str = defaults.KERNEL_DTYPE,
    attention: str = defaults.KERNELS,
    expert_weights: str | None = None,
    other_weights: str | None = None,
    name: str | None = None,
    launch_s: float = defaults.LAUNCH_S,
    host_s: float = defaults.HOST_S,
) -> Timings:
    """A timing trace of one model's shape on one GPU, from aiconfigurator's tables.

    Rows that are faster than the GPU's memory take their bytes / bandwidth. A TimingWarning says what is implausible:
    steps slower than four times the roofline where another framework's tables have better, a bad fit of the experts,
    weights beyond the GPU's memory. The trace keeps these lines.

    Args:
        source: "aiconfigurator-core" (the installed package) or a folder of its parquet files.
        shape: Sizes of the model.
        gpu: The GPU as the tables spell it.
        moe: Whose MoE kernels, as FRAMEWORK, FRAMEWORK:VERSION or FRAMEWORK:VERSION:KERNEL. By default the newest
            version; where kernels were measured at the same sizes, the one with the most rows, or the fastest of those.
            "fastest": those of the framework that is fastest in the geometric mean over the sizes; so for `dense` and
            `attention`.
        moe_dtype: Their type as the tables spell it, e.g. "bfloat16" or "int4_wo".
        dense: Whose GEMM kernels.
        gemm_dtype: Their type.
        attention: Whose attention kernels.
        expert_weights: Key of `model_shapes.WEIGHT_BYTES`: the experts' size in memory; default: that of `moe_dtype`.
        other_weights: The same for all other weights; default: that of `gemm_dtype`.
        name: Of the trace; default: made from GPU, model and type.
        launch_s: Seconds per kernel launch; the tables do not hold it.
        host_s: Seconds of host time per pass; the tables do not hold it.

    Raises:
        TimingError: The tables hold no such GPU, kernel or shape; the message lists what they hold.
    """
    tables = Tables(source, gpu)
    attends = "generation_mla" if shape.latent_kv else "generation"
    expert_weights = _weights(expert_weights, moe_dtype, "expert_weights")
    other_weights = _weights(other_weights, gemm_dtype, "other_weights")
    importer = Kernels(tables, shape, dense, (moe_dtype, expert_weights), (gemm_dtype, other_weights))
    gemm = importer.chosen("gemm", dense, importer.dense)
    importer.dense_choice = gemm.name
    attended = importer.chosen(attends, attention, importer.attention)
    experts = importer.chosen("moe", moe, importer.experts)
    fit = experts.fit
    errors, dropped = np.abs(fit.errors), tuple(experts.rows.index[~fit.kept].tolist())
    parts = (
        ("gemm", "dense", dense, gemm, importer.dense),
        (attends, "attention", attention, attended, importer.attention),
        ("moe", "moe", moe, experts, importer.experts),
    )
    told: list[str] = []  # what is not plausible
    weighed: list[str] = []  # slow at some sizes, and the fastest in the mean
    for kind, option, choice, part, build in parts:
        (weighed if choice == FASTEST else told).extend(importer.slow(kind, option, part, build))
    if errors.max() > OUTLIER:
        worst = int(errors.argmax())
        told.append(
            f"experts: t = base + sum f(m) is {errors.max():.0%} off the {1e6 * experts.rows.iloc[worst]:.4g} us of "
            f"{experts.rows.index[worst]} tokens, {errors.mean():.1%} in the mean of all rows"
        )
    floored = gemm.floored + attended.floored + experts.floored
    weights, memory = shape.weights_bytes(expert_weights, other_weights), int(tables.system["gpu"]["mem_capacity"])
    too_large = f". {TOO_LARGE}" if weights > memory else ""
    timings = Timings(
        points=tuple(gemm.points + attended.points + experts.points),
        name=name or f"{gpu}-{shape.name}-{moe_dtype}",
        source="imported",
        device=experts.device,
        model=shape.name,
        dtype=f"experts {moe_dtype}, the rest {gemm_dtype}",
        framework=f"MoE {experts.name} ({', '.join(experts.kernels)}), GEMM {gemm.name}, attention {attended.name}",
        date="not stated by the tables",
        licence=LICENCE,
        provenance=f"NVIDIA aiconfigurator's tables for {gpu}, read by step_times/aiconfigurator/; "
        f"see docs/timing_traces.md{too_large}",
        layers=shape.layers,
        hidden=shape.hidden,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_mode="fused",
        experts_base_s=float(f"{fit.base:.6g}"),
        launch_s=launch_s,
        launches_per_expert=3,
        host_s=host_s,
        suspend_s=2 * launch_s,
        resume_s=launch_s,
        kv_bytes_per_token=shape.kv_bytes_per_token(),
        sequence_bytes=shape.sequence_bytes(),
        weights_bytes=weights,
        memory_bytes=memory,
        host_bandwidth=float(tables.system["node"]["pcie_bw"]),
        max_context=shape.max_context or None,
        least_s=importer.least,
        conditions={
            "timed": "kernel time: CUDA-graph replays between CUDA events; repeats and spread not stated",
            "expert_fit": f"relative error on its own rows: mean {errors.mean():.4f}, largest {errors.max():.4f}",
            **({"expert_fit_dropped": f"rows of {dropped} tokens, far off the line"} if dropped else {}),
            **kernels_note(tables, (part.name for part in (gemm, attended, experts))),
            **({NOTES[5]: "; ".join(weighed)} if weighed else {}),
            **({"implausible": told} if told else {}),
        },
        modelled={
            "dense_pre, dense_post, head": "measured GEMMs plus norm, rotary embedding, KV write, sampling as memory "
            "traffic (aiconfigurator's bytes / (0.8 x bandwidth) + 3 us)",
            "attention_prefill": "rows with a context, and beyond the longest measured prompt (source = modelled)",
            "attention_decode": "outliers, corners that did not fit the GPU, the longest context (source = modelled)",
            "experts_base_s, expert": "t = base + sum f(m), fitted to rows with evenly spread tokens"
            + (f"; steps of {experts.tile} tokens, the kernel's block (source = modelled)" if experts.tile else ""),
            **shape_notes(shape, floored),
            "launch_s": "parameter, about 5 us a launch by secondary sources",
            "host_s": "parameter, no measurement",
            "suspend_s, resume_s": "an event synchronise (taken as one launch) plus one launch; one launch",
        },
    )
    for line in timings.implausible():
        warnings.warn(f"timings {timings.name!r}: {line}", TimingWarning, stacklevel=2)
    return timings
