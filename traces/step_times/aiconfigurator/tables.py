"""Reader of NVIDIA aiconfigurator's tables (Apache-2.0): GPU kernel times of GEMMs, attention and fused MoE layers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from qllm.traces.step_times.file_format import TimingError

PACKAGE = "aiconfigurator_core"
LICENCE = "Apache-2.0 (NVIDIA aiconfigurator, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES)"
FILES = {  # kind of table: (folder, how its file's name begins, the columns that name a row)
    "gemm": ("gemm", "gemm_perf", ("m", "n", "k")),
    "context": ("attention", "context_attention_perf", ("isl",)),
    "generation": ("attention", "generation_attention_perf", ("batch_size", "step")),
    "moe": ("moe", "moe_perf", ("num_tokens",)),
    "context_mla": ("mla", "context_mla_perf", ("isl",)),
    "generation_mla": ("mla", "generation_mla_perf", ("batch_size", "step")),
    "mla_bmm": ("mla_bmm", "mla_bmm_perf", ("num_tokens",)),
}
# Of a type of kernels: that of the weights in memory (a key of WEIGHT_BYTES), and whose peak the arithmetic has.
DTYPES = {
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("fp16", "bfloat16"),
    "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8", "fp8"),
    "int8_wo": ("int8", "bfloat16"),
    "sq": ("int8", "int8"),
    "int4_wo": ("int4", "bfloat16"),
    "nvfp4": ("nvfp4", "fp4"),
    "w4afp8": ("int4", "fp8"),
    "w4a16_mxfp4": ("mxfp4", "bfloat16"),
    "w4a8_mxfp4_mxfp8": ("mxfp4", "fp8"),
}
ALIASES = {"workload_distribution": "distribution"}  # what some tables call a column
KERNEL = "kernel_source"
# Columns in which the rows of one curve may differ: what was measured, and by what.
FREE = {"latency", KERNEL, "framework", "version", "device", "op_name", "isl", "power", "power_limit", "tp_size"}


class Tables:
    """The tables of one GPU, from a folder of parquet files or the installed package ("aiconfigurator-core").

    Layouts: the package's systems/data/GPU/OP/FRAMEWORK/VERSION/FILE.parquet (`source`: GPU or any folder above), and a
    flat OP__FRAMEWORK__VERSION__FILE.parquet. TimingError where nothing is found.
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
            if found in self.files:
                raise TimingError(
                    f"{path}: a second {' table of '.join(found[:2])}:{found[2]}, beside {self.files[found]}"
                )
            if found is not None:
                self.files[found] = path
        if not self.files:
            systems = sorted({path.parents[3].name for path in self.root.rglob("gemm_perf.parquet")}) or ["none"]
            raise TimingError(f"{self.root}: no tables for GPU {gpu!r}; GPUs here: {', '.join(systems)}")
        self.system = self._system()
        self.passed_over: dict[str, list[str]] = {}  # FRAMEWORK:VERSION:KERNEL: others, measured at the same sizes

    def _identify(self, path: Path) -> tuple[str, str, str] | None:
        """(kind, framework, version) of a file, or None where it is of another GPU or of no use here."""
        parts = path.stem.split("__") if "__" in path.stem else (*path.parts[-4:-1], path.stem)
        nested = "__" not in path.stem
        if len(parts) != 4 or (nested and path.parts[-5:-4] != (self.gpu,)):
            return None
        op, framework, version, stem = parts
        for kind, (folder, prefix, _) in FILES.items():
            if op == folder and stem.startswith(prefix):
                return kind, framework, version
        return None

    def _system(self) -> dict[str, Any]:
        for folder in (self.root, *list(self.root.parents)[:2]):
            path = folder / f"{self.gpu}.yaml"
            if path.is_file():
                return _checked_system(path)
        raise TimingError(f"{self.root}: no {self.gpu}.yaml, which gives memory size and bandwidth")

    def frameworks(self, kind: str) -> list[str]:
        """Whose tables of a kind there are."""
        return sorted({framework for held, framework, _ in self.files if held == kind})

    def read(self, kind: str, choice: str, **wanted: Any) -> tuple[pd.DataFrame, str]:
        """Rows with these values in the table of `choice`, and FRAMEWORK:VERSION.

        `choice`: FRAMEWORK[:VERSION[:KERNEL]]; by default the newest version, and of kernels that were measured at the
        same sizes the one with the most rows, or the fastest of those; it is then named too.
        TimingError where no table has any: it names the first column without a match, and what that holds.
        """
        framework, version, kernel = (*choice.split(":", 2), "", "")[:3]
        here = sorted({(f, v) for k, f, v in self.files if k == kind}, key=lambda fv: (fv[0], _version_key(fv[1])))
        fitting = [fv for fv in here if fv[0] == framework and version in ("", fv[1])]
        if not fitting:
            names = ", ".join(f"{f}:{v}" for f, v in here) or "none"
            raise TimingError(f"{self.root}: no {kind} table of {choice!r} for {self.gpu}; there are: {names}")
        errors = []
        for found in reversed(fitting):
            name = ":".join(found)
            what, keys = f"{kind} table {name}", FILES[kind][2]
            try:
                if kernel:
                    wanted = {**wanted, KERNEL: kernel}
                rows = _select(_parquet(self.files[kind, *found], what, keys), what, **wanted)
                rows, chosen, others = _one_kernel(rows, keys)
                kernel = kernel or chosen
                if others:
                    self.passed_over[f"{name}:{chosen}"] = others
                return _checked_rows(rows, what, keys), f"{name}:{kernel}" if kernel else name
            except TimingError as error:
                errors.append(error)
        raise errors[0]


def _checked_system(path: Path) -> dict[str, Any]:
    """What a GPU's YAML file says. TimingError unless it has what an import needs."""
    try:
        system = yaml.safe_load(path.read_text(encoding="utf-8"))
        needed = [system["gpu"]["mem_bw"], system["gpu"]["mem_capacity"], system["node"]["pcie_bw"]]
        if not all(float(value) > 0 for value in needed):
            raise ValueError
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise TimingError(f"{path}: needs gpu.mem_bw, gpu.mem_capacity and node.pcie_bw, each above 0") from None
    checked: dict[str, Any] = system
    return checked


def _parquet(path: Path, what: str, keys: tuple[str, ...]) -> pd.DataFrame:
    """The table in a file. TimingError where it is none, a column stands twice, or one is missing."""
    try:
        frame = pd.read_parquet(path).rename(columns=ALIASES)
    except (OSError, ValueError) as error:
        raise TimingError(f"{path}: cannot be read as a parquet table: {error}") from None
    for column in frame.columns[frame.columns.duplicated()]:
        raise TimingError(f"{what}: column {column!r} stands twice")
    for column in (*keys, "latency"):
        if column not in frame.columns:
            raise TimingError(f"{what}: column {column!r} is missing")
    return frame if KERNEL in frame.columns else frame.assign(**{KERNEL: "not stated"})


def _version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _select(frame: pd.DataFrame, what: str, **wanted: Any) -> pd.DataFrame:
    """Rows with these values. Tables without a column window_size hold attention over all tokens."""
    for column, value in wanted.items():
        if column == "window_size" and value == 0 and column not in frame.columns:
            continue
        if column not in frame.columns:
            raise TimingError(f"{what}: column {column!r} is missing, so rows with {column} = {value} cannot be told")
        rows = frame[frame[column] == value]
        if rows.empty:
            held = ", ".join(str(v) for v in sorted(frame[column].unique().tolist(), key=str))
            raise TimingError(f"{what}: no rows with {column} = {value}; with what was asked before, there are: {held}")
        frame = rows
    return frame


def _one_kernel(rows: pd.DataFrame, keys: tuple[str, ...]) -> tuple[pd.DataFrame, str, list[str]]:
    """(The rows of one kernel, its name, the others') where several were measured at the same sizes; else all rows.

    Kernels that share the sizes out among them are one curve: the framework itself takes one or the other.
    """
    kernels = rows.groupby(list(keys))[KERNEL].nunique()
    if (kernels < 2).all():
        return rows, "", []
    shared = rows.set_index(list(keys)).loc[kernels.index[kernels > 1]]
    ranked = [
        (-len(mine), shared["latency"][shared[KERNEL] == kernel].sum(), str(kernel))
        for kernel, mine in rows.drop_duplicates([*keys, KERNEL]).groupby(KERNEL)
    ]
    best, *others = [kernel for _, _, kernel in sorted(ranked)]
    return rows[rows[KERNEL].astype(str) == best], best, others


def _checked_rows(rows: pd.DataFrame, what: str, keys: tuple[str, ...]) -> pd.DataFrame:
    """The rows. TimingError unless they differ in their sizes alone, and each has a latency."""
    for column in rows.columns:
        if column not in FREE and column not in keys and rows[column].nunique() > 1:
            held = ", ".join(str(value) for value in sorted(rows[column].unique().tolist(), key=str))
            raise TimingError(
                f"{what}: rows of the same sizes differ in {column} ({held}); which are meant is not known"
            )
    latency = pd.to_numeric(rows["latency"], errors="coerce")
    bad = rows[~(np.isfinite(latency) & (latency > 0))]
    if len(bad):
        first = ", ".join(f"{key} = {bad[key].iloc[0]}" for key in keys)
        raise TimingError(
            f"{what}: {len(bad)} of {len(rows)} rows have no latency above 0, first that of {first}: "
            f"{bad['latency'].iloc[0]!s}"
        )
    return rows.assign(latency=latency)


def series(frame: pd.DataFrame, column: str) -> pd.Series:
    """Median seconds by `column` (the tables give milliseconds; a few points were measured twice)."""
    return frame.groupby(column)["latency"].median().sort_index() / 1e3


def gemm_seconds(frame: pd.DataFrame, n: int, k: int) -> pd.Series:
    """Seconds of a GEMM [m, k] x [k, n] by m: the measured rows, or log-log linear between the nearest n and k.

    Below the grid its smallest size holds (latency-bound kernels); above, time grows in proportion.
    """

    def at_k(k_grid: int) -> pd.Series:
        rows = frame[frame["k"] == k_grid]
        return _between(rows["n"], n, lambda n_grid: series(rows[rows["n"] == n_grid], "m"))

    return _between(frame["k"], k, at_k)


def _between(grid: pd.Series, value: int, curve: Callable[[int], pd.Series]) -> pd.Series:
    sizes = np.unique(grid.to_numpy())
    if value in sizes or value < sizes[0]:
        return curve(max(value, int(sizes[0])))
    if value > sizes[-1]:
        return curve(int(sizes[-1])) * float(value / sizes[-1])
    high = int(np.searchsorted(sizes, value))
    low_size, high_size = int(sizes[high - 1]), int(sizes[high])
    share = np.log(value / low_size) / np.log(high_size / low_size)
    low_curve, high_curve = curve(low_size).align(curve(high_size), join="inner")
    between: pd.Series = np.exp((1 - share) * np.log(low_curve) + share * np.log(high_curve))
    return between


def add(*parts: pd.Series) -> pd.Series:
    """Sum over the sizes that all parts hold."""
    total = parts[0]
    for part in parts[1:]:
        total = total.add(part).dropna()
    return total


class Memory:
    """Element-wise kernels as memory traffic: aiconfigurator's own formula, bytes / (bandwidth x 0.8) + 3 us."""

    def __init__(self, system: dict[str, Any]) -> None:
        gpu = system["gpu"]
        self.peak: float = gpu["mem_bw"]
        self.bandwidth: float = self.peak * gpu.get("mem_bw_empirical_scaling_factor", 0.8)
        self.latency: float = gpu.get("mem_empirical_constant_latency", 3e-6)

    def seconds(self, traffic: float) -> float:
        """Seconds to move `traffic` bytes through device memory, in one kernel."""
        return traffic / self.bandwidth + self.latency

    def by_rows(self, rows: pd.Index, bytes_per_row: float) -> pd.Series:
        """Seconds by number of rows."""
        return pd.Series(rows.to_numpy() * bytes_per_row / self.bandwidth + self.latency, index=rows)
