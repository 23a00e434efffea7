"""Import of NVIDIA's published kernel measurements (aiconfigurator, Apache-2.0) as a timing trace.

The tables hold GPU kernel time (CUDA-graph replays between CUDA events) of GEMMs, attention and fused MoE layers. What
they do not hold is modelled here and said so in the header's `modelled`: norms and rotary embedding (memory traffic),
sampling, attention over a cached prefix, launches, the host. docs/timing_traces.md gives every formula.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from traces.interpolate import isotonic
from traces.shapes import ModelShape
from traces.timing import Timings
from traces.timing_format import Point, TimingError

PACKAGE = "aiconfigurator_core"
LICENCE = "Apache-2.0 (NVIDIA aiconfigurator, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES)"
FILES = {
    "gemm": ("gemm", "gemm_perf"),
    "context": ("attention", "context_attention_perf"),
    "generation": ("attention", "generation_attention_perf"),
    "moe": ("moe", "moe_perf"),
}
PREFILL_CONTEXTS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
PREFILL_BEYOND = (24576, 32768)  # token counts past the tables' 16,384, continued with the square of the length


class Tables:
    """The tables of one GPU: a folder of parquet files, or the installed package (`source` = "aiconfigurator-core").

    Two folder layouts are read: the package's own, systems/data/GPU/OP/FRAMEWORK/VERSION/FILE.parquet (`source` may be
    any folder above OP), and a flat one, OP__FRAMEWORK__VERSION__FILE.parquet. TimingError where nothing is found.
    """

    def __init__(self, source: str | Path, gpu: str) -> None:
        self.gpu = gpu
        if str(source) in ("aiconfigurator-core", PACKAGE):
            spec = importlib.util.find_spec(PACKAGE)
            if spec is None or spec.origin is None:
                raise TimingError(
                    "aiconfigurator-core is not installed; pip install 'qllm-moe[timings]', or give a folder"
                )
            self.root = Path(spec.origin).parent / "systems"
        else:
            self.root = Path(source)
        self.files: dict[tuple[str, str, str], Path] = {}
        for path in sorted(self.root.rglob("*.parquet")):
            found = self._identify(path)
            if found is not None:
                self.files[found] = path
        if not self.files:
            systems = sorted(path.name for path in (self.root / "data").glob("*")) or ["none"]
            raise TimingError(f"{self.root}: no tables for GPU {gpu!r}; GPUs here: {', '.join(systems)}")
        self.system = self._system()

    def _identify(self, path: Path) -> tuple[str, str, str] | None:
        """(kind, framework, version) of a file, or None where it is of another GPU or of no use here."""
        parts = path.stem.split("__") if "__" in path.stem else (*path.parts[-4:-1], path.stem)
        nested = "__" not in path.stem
        if len(parts) != 4 or (nested and self.gpu not in path.parts[-5:-4] and (self.root / "data").is_dir()):
            return None
        op, framework, version, stem = parts
        for kind, (folder, prefix) in FILES.items():
            if op == folder and stem.startswith(prefix):
                return kind, framework, version
        return None

    def _system(self) -> dict[str, Any]:
        for path in (self.root / f"{self.gpu}.yaml", self.root.parent / f"{self.gpu}.yaml"):
            if path.is_file():
                return yaml.safe_load(path.read_text(encoding="utf-8"))
        raise TimingError(f"{self.root}: no {self.gpu}.yaml, which gives memory size and bandwidth")

    def read(self, kind: str, choice: str) -> tuple[pd.DataFrame, str]:
        """Rows of one table; `choice` is FRAMEWORK or FRAMEWORK:VERSION (without one: the newest there is)."""
        framework, _, version = choice.partition(":")
        here = sorted({(f, v) for k, f, v in self.files if k == kind}, key=lambda fv: (fv[0], _version_key(fv[1])))
        fitting = [fv for fv in here if fv[0] == framework and version in ("", fv[1])]
        if not fitting:
            names = ", ".join(f"{f}:{v}" for f, v in here) or "none"
            raise TimingError(f"{self.root}: no {kind} table of {choice!r} for {self.gpu}; there are: {names}")
        path = self.files[kind, *fitting[-1]]
        try:
            return pd.read_parquet(path), ":".join(fitting[-1])
        except (OSError, ValueError) as error:
            raise TimingError(f"{path}: cannot be read as a parquet table: {error}") from None


def _version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _select(frame: pd.DataFrame, what: str, **wanted: Any) -> pd.DataFrame:
    """Rows with these values; TimingError that names the first column without a match, and what it holds."""
    for column, value in wanted.items():
        if column not in frame.columns:
            continue
        rows = frame[frame[column] == value]
        if rows.empty:
            held = ", ".join(str(v) for v in sorted(frame[column].unique().tolist()))
            raise TimingError(
                f"{what}: no rows with {column} = {value}; with the columns before it fixed, there are: {held}"
            )
        frame = rows
    return frame


def _series(frame: pd.DataFrame, column: str) -> pd.Series:
    """Median seconds by `column` (the tables give milliseconds; a few points were measured twice)."""
    return frame.groupby(column)["latency"].median().sort_index() / 1e3


@dataclass(frozen=True)
class ExpertFit:
    """t_layer = base + sum_e f(m_e), from rows in which every active expert has the same number of tokens.

    tokens: int64[n], tokens per expert; seconds: float64[n], f at these; base: seconds per layer call; error: largest
    and mean relative error of the fit on the rows it was made from.
    """

    base: float
    tokens: np.ndarray
    seconds: np.ndarray
    error_max: float
    error_mean: float

    def layer(self, counts: np.ndarray) -> float:
        """Seconds of one MoE layer whose experts get `counts` tokens (int[experts])."""
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.tokens[-1] - self.tokens[-2])
        above = np.maximum(counts - self.tokens[-1], 0) * slope
        f = np.where(counts > 0, np.interp(counts, self.tokens, self.seconds) + above, 0.0)
        return float(self.base + f.sum())


def balanced_counts(tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Tokens per expert when `tokens` x `top_k` assignments are spread as evenly as can be, int64[experts]."""
    share, rest = divmod(tokens * top_k, experts)
    return np.array([share + 1] * rest + [share] * (experts - rest))


def fit_experts(layer: pd.Series, experts: int, top_k: int) -> ExpertFit:
    """Fit base and f to a balanced table: `layer` is seconds by number of tokens.

    Rows with fewer than `experts` assignments have one token in each of tokens x top_k experts, so their times lie on
    a line: base + active * f(1), fitted by least squares on relative errors, together with the first row in which all
    experts have one token where there is one. From the other rows, f(m) = (t - base) / experts, then isotonic.
    """
    tokens = layer.index.to_numpy(dtype=np.int64)
    seconds = layer.to_numpy(dtype=float)
    assigned = tokens * top_k
    few = assigned <= experts
    if few.sum() < 2:
        raise TimingError(
            f"the base needs 2 rows of at most {experts} assignments (tokens x top_k); there are {few.sum()}"
        )
    design = np.stack([np.ones(few.sum()), assigned[few]], axis=1) / seconds[few, None]
    base, one = np.linalg.lstsq(design, np.ones(few.sum()), rcond=None)[0]
    base = max(float(base), 0.0)
    full = assigned > experts
    sizes = np.concatenate([[1], np.maximum(assigned[full] // experts, 1)])
    times = np.concatenate([[one], (seconds[full] - base) / experts])
    sizes, at = np.unique(sizes, return_index=True)
    fit = ExpertFit(base, sizes, isotonic(times[at]), 0.0, 0.0)
    errors = [
        abs(fit.layer(balanced_counts(int(n), top_k, experts)) / t - 1) for n, t in zip(tokens, seconds, strict=True)
    ]
    return ExpertFit(base, fit.tokens, fit.seconds, float(max(errors)), float(np.mean(errors)))


def gemm_seconds(frame: pd.DataFrame, n: int, k: int) -> pd.Series:
    """Seconds of a GEMM [m, k] x [k, n] by m: the measured rows, or between the nearest n and k on the grid.

    Off the grid, log(seconds) is interpolated linearly in log n and log k. Below the grid's smallest size the smallest
    holds (such kernels are bound by latency); above its largest, time grows in proportion.
    """

    def at_k(k_grid: int) -> pd.Series:
        rows = frame[frame["k"] == k_grid]
        return _between(rows["n"], n, lambda n_grid: _series(rows[rows["n"] == n_grid], "m"))

    return _between(frame["k"], k, at_k)


def _between(grid: pd.Series, value: int, curve: Any) -> pd.Series:
    sizes = np.unique(grid.to_numpy())
    if value in sizes or value < sizes[0]:
        return curve(max(value, int(sizes[0])))
    if value > sizes[-1]:
        return curve(int(sizes[-1])) * (value / sizes[-1])
    high = int(np.searchsorted(sizes, value))
    low_size, high_size = int(sizes[high - 1]), int(sizes[high])
    share = np.log(value / low_size) / np.log(high_size / low_size)
    low_curve, high_curve = curve(low_size).align(curve(high_size), join="inner")
    return np.exp((1 - share) * np.log(low_curve) + share * np.log(high_curve))


def _add(*parts: pd.Series) -> pd.Series:
    """Sum over the sizes that all parts hold."""
    total = parts[0]
    for part in parts[1:]:
        total = total.add(part).dropna()
    return total


class _Memory:
    """Element-wise kernels as memory traffic: aiconfigurator's own formula, bytes / (bandwidth x 0.8) + 3 us."""

    def __init__(self, system: dict[str, Any]) -> None:
        gpu = system["gpu"]
        self.bandwidth = gpu["mem_bw"] * gpu.get("mem_bw_empirical_scaling_factor", 0.8)
        self.latency = gpu.get("mem_empirical_constant_latency", 3e-6)

    def by_rows(self, rows: pd.Index, bytes_per_row: float) -> pd.Series:
        return pd.Series(rows.to_numpy() * bytes_per_row / self.bandwidth + self.latency, index=rows)


def dense_points(gemm: pd.DataFrame, shape: ModelShape, memory: _Memory, source: str) -> list[Point]:
    """dense_pre, dense_post and head from GEMM rows plus memory traffic (16-bit activations)."""
    hidden, width = shape.hidden, shape.qkv_width
    qkv = gemm_seconds(gemm, width, hidden)
    out = gemm_seconds(gemm, hidden, shape.heads * shape.head_dim)
    router = gemm_seconds(gemm, shape.experts, hidden)
    lm_head = gemm_seconds(gemm, shape.vocab, hidden)
    # A norm with residual add reads and writes two rows; rotary embedding and the KV write touch Q, K, V once each way.
    norm = memory.by_rows(qkv.index, 4 * hidden * 2)
    steps = {
        "dense_pre": _add(norm, qkv, memory.by_rows(qkv.index, 2 * width * 2)),
        "dense_post": _add(out, norm, router),
        # Sampling: the 16-bit logits are read and written as 32-bit probabilities, then read once more.
        "head": _add(norm, lm_head, memory.by_rows(lm_head.index, shape.vocab * (2 + 4 + 4))),
    }
    if shape.shared_inter:
        up = gemm_seconds(gemm, 2 * shape.shared_inter, hidden)
        down = gemm_seconds(gemm, hidden, shape.shared_inter)
        act = memory.by_rows(up.index, 3 * shape.shared_inter * 2)
        steps["dense_post"] = _add(steps["dense_post"], up, act, down)
    sizes = [int(m) for m in qkv.index if _kept(int(m))]
    return [
        Point(step, m, None, float(series[m]), source=source)
        for step, series in steps.items()
        for m in sizes
        if m in series.index and (step != "head" or m <= 2048)
    ]


def _kept(m: int) -> bool:
    """Sizes that go into the file: the powers of two and the points midway between them, which is plenty."""
    return m & (m - 1) == 0 or (m % 3 == 0 and (m // 3) & (m // 3 - 1) == 0) or m in (80, 160, 320)


def prefill_points(causal: pd.Series, decode_one: pd.Series, source: str) -> list[Point]:
    """attention_prefill from causal attention of whole prompts (`causal`, seconds by length, nothing cached).

    n tokens over c cached ones do the share (L^2 - c^2) / L^2 of the work of a whole prompt of L = n + c tokens
    (aiconfigurator's own correction for a cached prefix), and take at least as long as n tokens alone, and as one
    decode step over the same length (`decode_one`, seconds by context at batch 1), which reads the same cache.
    """
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
            floor = float(np.interp(c, decode_one.index.to_numpy(dtype=float), decode_one.to_numpy()))
            seconds = max(whole(n), whole(n + c) * share, floor if c else 0.0)
            points.append(Point("attention_prefill", n, c, seconds, source="modelled"))
    return points


def decode_points(frame: pd.DataFrame, source: str, max_batch: int = 512) -> list[Point]:
    """attention_decode: batch by cached tokens; large corners that did not fit the GPU grow in proportion to the batch."""
    grid = frame.groupby(["batch_size", "step"])["latency"].median().unstack() / 1e3
    grid = grid[grid.index <= max_batch].dropna(axis=1, how="all")
    points = []
    for context in grid.columns:
        column = grid[context].dropna()
        for batch in grid.index:
            if batch in column.index:
                points.append(Point("attention_decode", int(batch), int(context), float(column[batch]), source=source))
            else:
                near = column.index[column.index < batch].max() if (column.index < batch).any() else column.index.min()
                seconds = float(column[near] * max(batch / near, 1.0))
                points.append(Point("attention_decode", int(batch), int(context), seconds, source="modelled"))
    return points


def import_aiconfigurator(
    source: str | Path,
    *,
    shape: ModelShape,
    gpu: str = "a100_sxm",
    moe: str = "sglang",
    moe_dtype: str = "bfloat16",
    dense: str = "sglang",
    gemm_dtype: str = "bfloat16",
    attention: str = "sglang",
    expert_weights: str = "bf16",
    other_weights: str = "bf16",
    name: str | None = None,
    launch_s: float = 5e-6,
    host_s: float = 1e-3,
) -> Timings:
    """A timing trace of `shape` on `gpu` from aiconfigurator's tables.

    source: "aiconfigurator-core" (the installed package) or a folder of its parquet files. moe, dense, attention: whose
    kernels, as FRAMEWORK or FRAMEWORK:VERSION. moe_dtype, gemm_dtype: as the tables spell it ("bfloat16", "int4_wo").
    expert_weights, other_weights: keys of traces.shapes.WEIGHT_BYTES, for the size in memory. launch_s: seconds per
    kernel launch; host_s: seconds of host time per pass (neither is in the tables). TimingError where the tables hold
    no such GPU, kernel or shape; the message lists what they hold.
    """
    tables = Tables(source, gpu)
    if shape.latent_kv:
        raise TimingError(f"{shape.name}: latent attention is not among the tables that this importer reads")
    gemm, gemm_of = tables.read("gemm", dense)
    context, _ = tables.read("context", attention)
    generation, attention_of = tables.read("generation", attention)
    layers, moe_of = tables.read("moe", moe)
    device = str(layers["device"].iloc[0])

    gemm = _select(gemm, f"gemm table {gemm_of}", gemm_dtype=gemm_dtype)
    heads = {
        "head_dim": shape.head_dim,
        "num_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "window_size": 0,
    }
    bits = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    context = _select(context, f"context attention {attention_of}", **bits, **heads, batch_size=1, step=0)
    generation = _select(generation, f"generation attention {attention_of}", **bits, **heads)
    layers = _select(
        layers,
        f"moe table {moe_of}",
        **{
            "moe_dtype": moe_dtype,
            "hidden_size": shape.hidden,
            "inter_size": shape.inter,
            "num_experts": shape.experts,
        },
        **{"topk": shape.top_k, "moe_tp_size": 1, "moe_ep_size": 1, "distribution": "balanced"},
    )
    fit = fit_experts(_series(layers, "num_tokens"), shape.experts, shape.top_k)

    memory = _Memory(tables.system)
    points = dense_points(gemm, shape, memory, "imported")
    points += prefill_points(
        _series(context, "isl"), _series(generation[generation["batch_size"] == 1], "step"), "imported"
    )
    points += decode_points(generation, "imported")
    points += [
        Point("expert", int(m), None, float(f), source="imported") for m, f in zip(fit.tokens, fit.seconds, strict=True)
    ]
    kernels = ", ".join(sorted(layers["kernel_source"].unique().tolist()))
    return Timings(
        points=tuple(points),
        name=name or f"{gpu}-{shape.name}-{moe_dtype}",
        source="imported",
        device=device,
        model=shape.name,
        dtype=f"experts {moe_dtype}, the rest {gemm_dtype}",
        framework=f"MoE {moe_of} ({kernels}), GEMM {gemm_of}, attention {attention_of}",
        date="not stated by the tables",
        licence=LICENCE,
        provenance=f"NVIDIA aiconfigurator's tables for {gpu}, read by traces.timing_import; see docs/timing_traces.md",
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
            "expert_fit_error_mean": round(fit.error_mean, 4),
            "expert_fit_error_max": round(fit.error_max, 4),
        },
        modelled={
            "dense_pre, dense_post, head": "measured GEMMs plus norm, rotary embedding, KV write and sampling as memory "
            "traffic (aiconfigurator's bytes / (0.8 x bandwidth) + 3 us)",
            "attention_prefill": "rows with a context, and beyond the longest measured prompt (source = modelled)",
            "attention_decode": "corners of the grid that did not fit the GPU's memory (source = modelled)",
            "experts_base_s, expert": "t = base + sum f(m), fitted to rows with evenly spread tokens",
            "launch_s": "parameter, about 5 us a launch by secondary sources",
            "host_s": "parameter, no measurement",
            "suspend_s, resume_s": "an event synchronise (taken as one launch) plus one launch; one launch",
        },
    )
