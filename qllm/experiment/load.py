"""The load of each GPU over time: how busy it is, how full its passes, how much KV is in use, and who waits.

What a simulation records of its passes and decisions becomes means and maxima over windows of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qllm.config.config import RATE
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.run import Run, rate_of
from qllm.traces.results import LoadRecord, RunResult

LOAD = "load.parquet"
WINDOWS = 200  #: in the longest run, unless their length is given
MOST_ROWS = 1_000_000
QUEUES = ("waiting", "ready", "suspended")  #: where a request is that a GPU has, and that is in no running pass
FRONT = "in_front"  #: where those are that no GPU has yet

Steps = tuple[np.ndarray, np.ndarray]  #: when each value begins, and the values, each until the next one begins


def check_window(window: float | None) -> None:
    """Raise ConfigError where windows cannot be of that length, in seconds."""
    if window is not None and not (isfinite(window) and window > 0):
        raise ConfigError(f"--window is {window:g}; allowed: seconds above 0")


def load_table(recorded: Sequence[tuple[Run, RunResult]], window: float | None = None) -> pd.DataFrame:
    """The load of recorded runs: a row per run, GPU and window of time.

    Args:
        recorded: Runs, with what a simulation of each gave that recorded the load.
        window: Length of a window in seconds; default: that of the longest run / WINDOWS. The last one of a run ends
            with its last pass.

    Returns:
        policy, rate, further swept keys, seed, replica, start_s, end_s, utilisation; then sequences, tokens, kv_used,
        waiting, ready, suspended (and in_front, where requests wait in front of several GPUs), each as a mean over the
        window and, with _max behind its name, as the largest value in it; then the last four of each class as means:
        waiting.ls. No rows where nothing ran.

    Raises:
        ConfigError: `window` is not above 0, or so short that there are more than MOST_ROWS rows.
    """
    check_window(window)
    ends = [max((one.end for one in result.slices or ()), default=0.0) for _, result in recorded]
    width = max(ends, default=0.0) / WINDOWS if window is None else window
    rows = sum(run.config.replicas * end / width for (run, _), end in zip(recorded, ends, strict=True) if end)
    if rows > MOST_ROWS:
        raise ConfigError(
            f"--window {width:g} gives {rows:,.0f} windows; allowed: at most {MOST_ROWS:,}, as from "
            f"{width * rows / MOST_ROWS:.2g} seconds on"
        )
    parts = []
    for (run, result), end in zip(recorded, ends, strict=True):
        edges = _edges(end, width) if end else np.zeros(1)
        at: dict[str, Any] = {
            "policy": run.title,
            RATE: rate_of(run, request_trace(run.config, run.seed)),
            **{key: value for key, value in run.cells.items() if key != RATE},
            "seed": run.seed,
        }
        front = _front(run, result)
        for replica in range(run.config.replicas):
            over_time = {**_passes(result, replica), **_held(run, result, replica), **front}
            columns: dict[str, Any] = {"replica": np.int16(replica), "start_s": edges[:-1], "end_s": edges[1:]}
            for name, steps in over_time.items():
                columns[name] = means(steps, edges)
                if name != "utilisation" and "." not in name:
                    columns[f"{name}_max"] = largest(steps, edges)
            parts.append(pd.DataFrame({**at, **columns}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _edges(end: float, width: float) -> np.ndarray:
    """Where windows begin and end; rounding adds none that is all but empty."""
    edges = np.arange(ceil(end / width)) * width
    return np.append(edges[edges < end * (1 - 1e-9)], end)


def _passes(result: RunResult, replica: int) -> dict[str, Steps]:
    """What ran on a GPU; zero while nothing did."""
    mine = [one for one in result.slices or () if one.replica == replica]
    at = np.array([(one.start, one.end) for one in mine]).reshape(-1)
    values: dict[str, list[float]] = {
        "utilisation": [1 for _ in mine],
        "sequences": [one.prefills + one.decodes for one in mine],
        "tokens": [one.tokens for one in mine],
    }
    return {name: (at, np.array([(value, 0) for value in each]).reshape(-1)) for name, each in values.items()}


def _held(run: Run, result: RunResult, replica: int) -> dict[str, Steps]:
    """What a GPU held after its decisions and arrivals."""
    load = _load(result)
    points = [point for point in load.points if point.replica == replica]
    at = np.array([point.at for point in points])
    found = {"kv_used": (at, np.array([point.kv_used for point in points]))}
    shape = len(points), len(load.classes)
    counts = {name: np.array([getattr(point, name) for point in points], dtype=int).reshape(shape) for name in QUEUES}
    found |= {name: (at, each.sum(axis=1)) for name, each in counts.items()}
    for name, each in counts.items():
        found |= {f"{name}.{cls}": (at, column) for cls, column in _by_class(run, load, each).items()}
    return found


def _front(run: Run, result: RunResult) -> dict[str, Steps]:
    """Who waits in front of all GPUs; nothing where nobody can."""
    if run.config.replicas == 1 or run.config.router != "shared_queue":
        return {}
    load = _load(result)
    waited = np.flatnonzero(load.sent > result.arrival)
    at = np.concatenate([result.arrival[waited], load.sent[waited]])
    order = np.argsort(at, kind="stable")
    is_mine = np.array(load.cls)[waited, None] == np.arange(len(load.classes))
    counts = np.concatenate([is_mine, -1 * is_mine])[order].cumsum(axis=0)
    found = {f"{FRONT}.{cls}": (at[order], column) for cls, column in _by_class(run, load, counts).items()}
    return {FRONT: (at[order], counts.sum(axis=1)), **found}


def _by_class(run: Run, load: LoadRecord, counts: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `counts`, int[times, classes of the trace], by class of the configuration."""
    columns = dict(zip(load.classes, counts.T, strict=True))
    return {cls: columns.get(cls, np.zeros(len(counts), dtype=int)) for cls in run.config.classes}


def _load(result: RunResult) -> LoadRecord:
    if result.load is None:
        raise ValueError("the load was not recorded: simulate with load=True")
    return result.load


def means(steps: Steps, edges: np.ndarray) -> np.ndarray:
    """Means of a step function over the windows between `edges`, float64[windows]; it is 0 before its first step."""
    at, values = steps
    if not len(at):
        return np.zeros(len(edges) - 1)
    at = np.append(at, max(at[-1], edges[-1]))
    integral = np.append(0.0, np.cumsum(values * np.diff(at)))
    found: np.ndarray = np.diff(np.interp(edges, at, integral)) / np.diff(edges)
    return found


def largest(steps: Steps, edges: np.ndarray) -> np.ndarray:
    """Largest values of a step function in the windows between `edges`; what lasts no time does not count."""
    at, values = steps
    lasts = np.diff(at, append=np.inf) > 0
    at, values = np.append(-np.inf, at[lasts]), np.append(0, values[lasts])
    found = values[np.searchsorted(at, edges[:-1], side="right") - 1]  # as the window begins
    inside = (at > edges[0]) & (at < edges[-1])
    np.maximum.at(found, np.searchsorted(edges, at[inside], side="right") - 1, values[inside])
    return found


def write_load(table: pd.DataFrame, folder: Path) -> Path:
    """Write load.parquet into `folder`. ConfigError where that cannot be done."""
    path = folder / LOAD
    try:
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path
