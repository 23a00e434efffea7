"""NVIDIA's published kernel measurements (aiconfigurator, Apache-2.0) as a timing trace.

The tables hold GPU kernel time of GEMMs, attention and fused MoE layers. The rest is modelled (header: `modelled`):
norms, rotary embedding, sampling, cached prefixes, launches, the host. Formulas: docs/timing_traces.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from qllm.traces.step_times import import_defaults as defaults
from qllm.traces.step_times.aiconfigurator_tables import LICENCE, Memory, Tables, add, gemm_seconds, series
from qllm.traces.step_times.expert_fit import fit_balanced
from qllm.traces.step_times.file_format import Point, TimingError
from qllm.traces.step_times.interpolate import isotonic
from qllm.traces.step_times.model_shapes import ModelShape
from qllm.traces.step_times.timings import Timings

PREFILL_CONTEXTS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
DECODE_BATCH = 512  # larger batches are left out
DECODE_CONTEXT = 65535
SPIKE = 1.25
# Tokens of the largest block of a kernel that passes over an expert's weights once a block. SGLang's fused_marlin_moe
# takes blocks of 8, 16, 32, 48 or 64 tokens; the measured times step up after 64 and after each further 64.
TILES = {"sglang_marlin_moe": 64}
PREFILL_BEYOND = (24576, 32768)  # token counts past the tables' 16,384, continued with the square of the length


def dense_points(gemm: pd.DataFrame, shape: ModelShape, memory: Memory, source: str) -> list[Point]:
    """dense_pre, dense_post and head from GEMM rows plus memory traffic (16-bit activations)."""
    hidden, width = shape.hidden, shape.qkv_width
    qkv = gemm_seconds(gemm, width, hidden)
    out = gemm_seconds(gemm, hidden, shape.heads * shape.head_dim)
    router = gemm_seconds(gemm, shape.experts, hidden)
    lm_head = gemm_seconds(gemm, shape.vocab, hidden)
    # A norm with residual add reads and writes two rows; rotary embedding and the KV write touch Q, K, V once each way.
    norm = memory.by_rows(qkv.index, 4 * hidden * 2)
    steps = {
        "dense_pre": add(norm, qkv, memory.by_rows(qkv.index, 2 * width * 2)),
        "dense_post": add(out, norm, router),
        # Sampling: the 16-bit logits are read and written as 32-bit probabilities, then read once more.
        "head": add(norm, lm_head, memory.by_rows(lm_head.index, shape.vocab * (2 + 4 + 4))),
    }
    if shape.shared_inter:
        up = gemm_seconds(gemm, 2 * shape.shared_inter, hidden)
        down = gemm_seconds(gemm, hidden, shape.shared_inter)
        act = memory.by_rows(up.index, 3 * shape.shared_inter * 2)
        steps["dense_post"] = add(steps["dense_post"], up, act, down)
    sizes = [int(m) for m in qkv.index if _kept(int(m))]
    return [
        Point(step, m, None, float(curve[m]), source=source)
        for step, curve in steps.items()
        for m in sizes
        if m in curve.index and (step != "head" or m <= 2048)
    ]


def _kept(m: int) -> bool:
    """Sizes that go into the file: the powers of two and the points midway between them, which is plenty."""
    return m & (m - 1) == 0 or (m % 3 == 0 and (m // 3) & (m // 3 - 1) == 0) or m in (80, 160, 320)


def prefill_points(causal: pd.Series, decode: list[Point], source: str) -> list[Point]:
    """attention_prefill from causal attention of whole prompts (`causal`, seconds by length, nothing cached).

    n tokens over c cached ones: the share (L^2 - c^2) / L^2 of a whole prompt of L = n + c (aiconfigurator's
    correction), at least n tokens alone, and at least a `decode` step of one sequence over c, which reads the same
    cache.
    """
    alone = [(point.context, point.seconds) for point in decode if point.tokens == 1]
    lengths, times = causal.index.to_numpy(dtype=float), isotonic(causal.to_numpy())

    def whole(length: float) -> float:
        if length > lengths[-1]:
            return float(times[-1] * (length / lengths[-1]) ** 2)
        return float(np.exp(np.interp(np.log(length), np.log(lengths), np.log(times))))

    points = []
    for n in [int(length) for length in lengths] + [length for length in PREFILL_BEYOND if length > lengths[-1]]:
        for c in PREFILL_CONTEXTS:
            if c == 0 and n <= lengths[-1]:
                points.append(Point("attention_prefill", n, 0, float(causal[n]), source=source))
                continue
            share = n * (n + 2 * c) / (n + c) ** 2
            floor = float(np.interp(c, *np.array(alone, dtype=float).T))
            seconds = max(whole(n), whole(n + c) * share, floor if c else 0.0)
            points.append(Point("attention_prefill", n, c, seconds, source="modelled"))
    return points


def decode_points(frame: pd.DataFrame, source: str) -> list[Point]:
    """attention_decode by batch and cached tokens, from rows of one kernel and head layout.

    A row over SPIKE times that of a larger batch or context is dropped as an outlier. Gaps lie on a log-log line
    between two contexts. Large corners (out of GPU memory) and contexts up to DECODE_CONTEXT go in proportion to the
    last measured batch, or along the last slope over the context.
    """
    grid = frame.groupby(["batch_size", "step"])["latency"].median().unstack() / 1e3
    grid = grid[grid.index <= DECODE_BATCH].dropna(axis=1, how="all")
    times = np.array(grid, dtype=float)
    spikes = np.zeros(times.shape, dtype=bool)
    spikes[:, :-1] |= times[:, :-1] > SPIKE * times[:, 1:]
    spikes[:-1] |= times[:-1] > SPIKE * times[1:]
    times[spikes] = np.nan
    batches, contexts = grid.index.to_numpy(dtype=float), grid.columns.to_numpy(dtype=float)
    measured = np.isfinite(times)
    for row in times:
        held = np.flatnonzero(np.isfinite(row))
        inner = slice(held[0], held[-1] + 1)
        row[inner] = np.exp(np.interp(np.log(contexts[inner]), np.log(contexts[held]), np.log(row[held])))
    for at in range(1, len(batches)):
        times[at] = np.where(np.isfinite(times[at]), times[at], times[at - 1] * batches[at] / batches[at - 1])
    if contexts[-1] < DECODE_CONTEXT:
        slope = (times[:, -1] - times[:, -2]) / (contexts[-1] - contexts[-2])
        times = np.column_stack([times, times[:, -1] + slope * (DECODE_CONTEXT - contexts[-1])])
        measured = np.column_stack([measured, np.zeros(len(batches), dtype=bool)])
        contexts = np.append(contexts, DECODE_CONTEXT)
    return [
        Point(
            "attention_decode",
            int(batch),
            int(context),
            float(times[i, j]),
            source=source if measured[i, j] else "modelled",
        )
        for i, batch in enumerate(batches)
        for j, context in enumerate(contexts)
    ]


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
    expert_weights: str = defaults.WEIGHTS,
    other_weights: str = defaults.WEIGHTS,
    name: str | None = None,
    launch_s: float = defaults.LAUNCH_S,
    host_s: float = defaults.HOST_S,
) -> Timings:
    """A timing trace of one model's shape on one GPU, from aiconfigurator's tables.

    Args:
        source: "aiconfigurator-core" (the installed package) or a folder of its parquet files.
        shape: Sizes of the model.
        gpu: The GPU as the tables spell it.
        moe: Whose MoE kernels, as FRAMEWORK or FRAMEWORK:VERSION.
        moe_dtype: Their type as the tables spell it, e.g. "bfloat16" or "int4_wo".
        dense: Whose GEMM kernels.
        gemm_dtype: Their type.
        attention: Whose attention kernels.
        expert_weights: Key of `model_shapes.WEIGHT_BYTES`: the experts' size in memory.
        other_weights: The same for all other weights.
        name: Of the trace; default: made from GPU, model and type.
        launch_s: Seconds per kernel launch; the tables do not hold it.
        host_s: Seconds of host time per pass; the tables do not hold it.

    Raises:
        TimingError: The tables hold no such GPU, kernel or shape; the message lists what they hold.
    """
    tables = Tables(source, gpu)
    if shape.latent_kv:
        raise TimingError(f"{shape.name}: latent attention is not among the tables that this importer reads")
    heads = {
        "head_dim": shape.head_dim,
        "num_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "window_size": 0,
    }
    bits = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    experts = {
        "hidden_size": shape.hidden,
        "inter_size": shape.inter,
        "num_experts": shape.experts,
        "topk": shape.top_k,
    }
    alone = {"moe_tp_size": 1, "moe_ep_size": 1, "distribution": "balanced"}
    gemm, gemm_of = tables.read("gemm", dense, gemm_dtype=gemm_dtype)
    context, _ = tables.read("context", attention, **bits, **heads, batch_size=1, step=0)
    generation, attention_of = tables.read("generation", attention, **bits, **heads)
    layers, moe_of = tables.read("moe", moe, moe_dtype=moe_dtype, **experts, **alone)
    kernels = sorted(layers["kernel_source"].unique().tolist())
    tile = TILES.get(kernels[0]) if len(kernels) == 1 else None
    rows = series(layers, "num_tokens")
    fit = fit_balanced(rows, shape.experts, shape.top_k, tile)
    errors, dropped = np.abs(fit.errors), tuple(rows.index[~fit.kept].tolist())

    memory = Memory(tables.system)
    points = dense_points(gemm, shape, memory, "imported")
    decode = decode_points(generation, "imported")
    points += prefill_points(series(context, "isl"), decode, "imported") + decode
    points += [
        Point("expert", int(m), None, float(f), source="imported" if measured else "modelled")
        for m, f, measured in zip(fit.tokens, fit.seconds, fit.measured, strict=True)
    ]
    return Timings(
        points=tuple(points),
        name=name or f"{gpu}-{shape.name}-{moe_dtype}",
        source="imported",
        device=str(layers["device"].iloc[0]),
        model=shape.name,
        dtype=f"experts {moe_dtype}, the rest {gemm_dtype}",
        framework=f"MoE {moe_of} ({', '.join(kernels)}), GEMM {gemm_of}, attention {attention_of}",
        date="not stated by the tables",
        licence=LICENCE,
        provenance=f"NVIDIA aiconfigurator's tables for {gpu}, read by step_times/aiconfigurator.py; "
        "see docs/timing_traces.md",
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
        weights_bytes=shape.weights_bytes(expert_weights, other_weights),
        memory_bytes=int(tables.system["gpu"]["mem_capacity"]),
        host_bandwidth=float(tables.system["node"]["pcie_bw"]),
        conditions={
            "timed": "kernel time: CUDA-graph replays between CUDA events; repeats and spread not stated",
            "expert_fit": f"relative error on its own rows: mean {errors.mean():.4f}, largest {errors.max():.4f}",
            **({"expert_fit_dropped": f"rows of {dropped} tokens, far off the line"} if dropped else {}),
        },
        modelled={
            "dense_pre, dense_post, head": "measured GEMMs plus norm, rotary embedding, KV write, sampling as memory "
            "traffic (aiconfigurator's bytes / (0.8 x bandwidth) + 3 us)",
            "attention_prefill": "rows with a context, and beyond the longest measured prompt (source = modelled)",
            "attention_decode": "outliers, corners that did not fit the GPU, the longest context (source = modelled)",
            "experts_base_s, expert": "t = base + sum f(m), fitted to rows with evenly spread tokens"
            + (f"; steps of {tile} tokens, the kernel's block (source = modelled)" if tile else ""),
            "launch_s": "parameter, about 5 us a launch by secondary sources",
            "host_s": "parameter, no measurement",
            "suspend_s, resume_s": "an event synchronise (taken as one launch) plus one launch; one launch",
        },
    )
