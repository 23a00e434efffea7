"""Points of a timing trace from aiconfigurator's rows: dense steps, prefill and decode attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from qllm.traces.step_times.aiconfigurator.tables import Memory, add, gemm_seconds
from qllm.traces.step_times.file_format import Point, TimingError
from qllm.traces.step_times.interpolate import isotonic
from qllm.traces.step_times.model_shapes import ModelShape

PREFILL_CONTEXTS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
DECODE_BATCH = 512  # larger batches are left out
DECODE_CONTEXT = 65535
SPIKE = 1.25
PREFILL_BEYOND = (24576, 32768)  # token counts past the tables' 16,384, continued with the square of the length


def dense_points(
    gemm: pd.DataFrame, shape: ModelShape, memory: Memory, source: str, weight_bytes: float = 2.0
) -> list[Point]:
    """dense_pre, dense_post and head from GEMM rows plus memory traffic (16-bit activations).

    A GEMM takes at least as long as reading its weights, of `weight_bytes` each: where a row is faster, they were still
    in the L2 cache from the repeat before.
    """
    hidden, width, gemms = shape.hidden, shape.qkv_width, shape.gemms()
    floored: dict[str, set[int]] = {step: set() for step in gemms}

    def matmuls(step: str) -> list[pd.Series]:
        found = []
        for n, k in gemms[step]:
            rows, least = gemm_seconds(gemm, n, k), n * k * weight_bytes / memory.peak
            floored[step] |= {int(m) for m in rows.index[rows < least]}
            found.append(rows.clip(lower=least))
        return found

    qkv, *queries = matmuls("dense_pre")
    out, router, *shared = matmuls("dense_post")
    (lm_head,) = matmuls("head")
    # A norm with residual add reads and writes two rows; rotary embedding and the KV write touch Q, K, V once each way.
    norm = memory.by_rows(qkv.index, 4 * hidden * 2)
    steps = {
        "dense_pre": add(norm, qkv, *queries, memory.by_rows(qkv.index, 2 * width * 2)),
        "dense_post": add(out, norm, router),
        # Sampling: the 16-bit logits are read and written as 32-bit probabilities, then read once more.
        "head": add(norm, lm_head, memory.by_rows(lm_head.index, shape.vocab * (2 + 4 + 4))),
    }
    if shared:
        act = memory.by_rows(shared[0].index, 3 * shape.shared_inter * 2)
        steps["dense_post"] = add(steps["dense_post"], shared[0], act, shared[1])
    sizes = [int(m) for m in qkv.index if _kept(int(m))]
    return [
        Point(step, m, None, float(curve[m]), source="modelled" if m in floored[step] else source)
        for step, curve in steps.items()
        for m in sizes
        if m in curve.index and (step != "head" or m <= 2048)
    ]


def _kept(m: int) -> bool:
    """Sizes that go into the file: the powers of two and the points midway between them, which is plenty."""
    return m & (m - 1) == 0 or (m % 3 == 0 and (m // 3) & (m // 3 - 1) == 0) or m in (80, 160, 320)


def prefill_points(causal: pd.Series, decode: list[Point], source: str, window: int = 0) -> list[Point]:
    """attention_prefill from causal attention of whole prompts (`causal`, seconds by length, nothing cached).

    n tokens over c cached ones: the share (L^2 - c^2) / L^2 of a whole prompt of L = n + c (aiconfigurator's
    correction), at least n tokens alone, and at least a `decode` step of one sequence over c, which reads the same
    cache. With a `window`, pairs of tokens within it stand for squares. TimingError for too few rows.
    """
    alone = [(point.context, point.seconds) for point in decode if point.tokens == 1]
    if len(causal) < 2 or len(alone) < 2:
        raise TimingError(
            f"attention needs 2 lengths of prompts of one sequence and 2 contexts of a batch of 1, the tables have "
            f"{len(causal)} and {len(alone)}"
        )
    lengths, times = causal.index.to_numpy(dtype=float), isotonic(causal.to_numpy())

    def pairs(length: float) -> float:
        return length**2 if not window or length <= window else 2 * window * length - window**2

    def whole(length: float) -> float:
        if length > lengths[-1]:
            return float(times[-1] * pairs(length) / pairs(lengths[-1]))
        return float(np.exp(np.interp(np.log(length), np.log(lengths), np.log(times))))

    points = []
    for n in [int(length) for length in lengths] + [length for length in PREFILL_BEYOND if length > lengths[-1]]:
        for c in PREFILL_CONTEXTS:
            if c == 0 and n <= lengths[-1]:
                points.append(Point("attention_prefill", n, 0, float(causal[n]), source=source))
                continue
            share = (pairs(n + c) - pairs(c)) / pairs(n + c)
            floor = float(np.interp(c, *np.array(alone, dtype=float).T))
            seconds = max(whole(n), whole(n + c) * share, floor if c else 0.0)
            points.append(Point("attention_prefill", n, c, seconds, source="modelled"))
    return points


def decode_points(
    frame: pd.DataFrame, source: str, least: Callable[[float, float], float] | None = None
) -> list[Point]:
    """attention_decode by batch and cached tokens, from rows of one kernel and head layout.

    A row over SPIKE times that of a larger batch or context is dropped as an outlier. Gaps lie on a log-log line
    between two contexts. Large corners (out of GPU memory) and contexts up to DECODE_CONTEXT go in proportion to the
    last measured batch, or along the last slope over the context. `least`: seconds that a batch over a context takes at
    least; a faster row found its KV in the L2 cache. TimingError for too few rows.
    """
    grid = frame.groupby(["batch_size", "step"])["latency"].median().unstack() / 1e3
    grid = grid[grid.index <= DECODE_BATCH].dropna(axis=1, how="all")
    if grid.shape[0] < 1 or grid.shape[1] < 2:
        raise TimingError(
            f"decode attention needs 2 contexts (step) of a batch of at most {DECODE_BATCH}, the table has "
            f"{', '.join(str(context) for context in grid.columns) or 'none'}"
        )
    times = np.array(grid, dtype=float)
    spikes = np.zeros(times.shape, dtype=bool)
    spikes[:, :-1] |= times[:, :-1] > SPIKE * times[:, 1:]
    spikes[:-1] |= times[:-1] > SPIKE * times[1:]
    times[spikes] = np.nan
    batches, contexts = grid.index.to_numpy(dtype=float), grid.columns.to_numpy(dtype=float)
    logs = np.log(np.maximum(contexts, 0.5))
    measured = np.isfinite(times)
    for batch, row in zip(grid.index, times, strict=True):
        held = np.flatnonzero(np.isfinite(row))
        if not len(held):
            raise TimingError(
                f"decode attention: every row of batch {batch} is over {SPIKE} times that of a larger one"
            )
        if batch == grid.index[0]:
            row[: held[0]] = row[held[0]]  # a spike of the shortest context: no more than that of the next
        inner = slice(held[0], held[-1] + 1)
        row[inner] = np.exp(np.interp(logs[inner], logs[held], np.log(row[held])))
    if not np.isfinite(times[0]).all():
        missing = ", ".join(str(int(context)) for context in contexts[~np.isfinite(times[0])])
        raise TimingError(
            f"decode attention: the smallest batch, {grid.index[0]}, from which larger ones go on, has no row over a "
            f"context (step) of {missing}"
        )
    for at in range(1, len(batches)):
        times[at] = np.where(np.isfinite(times[at]), times[at], times[at - 1] * batches[at] / batches[at - 1])
    if contexts[-1] < DECODE_CONTEXT:
        slope = (times[:, -1] - times[:, -2]) / (contexts[-1] - contexts[-2])
        times = np.column_stack([times, times[:, -1] + slope * (DECODE_CONTEXT - contexts[-1])])
        measured = np.column_stack([measured, np.zeros(len(batches), dtype=bool)])
        contexts = np.append(contexts, DECODE_CONTEXT)
    if least is not None:
        floor = np.array([[least(batch, context) for context in contexts] for batch in batches])
        measured &= times >= floor
        times = np.maximum(times, floor)
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
