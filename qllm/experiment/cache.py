"""Finished simulations on disk, so that an interrupted sweep goes on where it stopped.

Each is a parquet file, named by a hash of all that its content depends on, which labels, SLOs, warm-up and `capacity`
are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qllm import config, experiment, scheduler, sim, traces
from qllm.experiment.run import Run, run_table
from qllm.traces.files import file_stamp, is_input_path
from qllm.traces.step_times.timings import ExtrapolationWarning

_WARNINGS = b"warnings"  #: key of the parquet file's metadata
_CATEGORIES: dict[str, type[Warning]] = {"ExtrapolationWarning": ExtrapolationWarning}


@dataclass
class CachedRun:
    """A simulation's `run_table`, and what it warned of: message -> category."""

    table: pd.DataFrame
    warned: dict[str, type[Warning]] = field(default_factory=dict)


def keys(todo: list[Run]) -> list[str]:
    """A hash for each run of everything that decides what it gives.

    That is its resolved configuration, its seed, the content of every file named there (a policy's Python file, but not
    what that imports), the project's code, and the versions of what computes it.
    """
    contents: Callable[[str], str] = cache(_content)
    base = {"sources": _sources(), "python": platform.python_version()}
    base |= {name: version(name) for name in ("numpy", "simpy")}
    return [hashlib.sha256(json.dumps([base, _depends_on(run, contents)]).encode()).hexdigest()[:32] for run in todo]


def finish(run: Run, path: Path | None = None) -> CachedRun:
    """Simulate `run`, and write what it gave to `path`. Raises what a simulation raises, and OSError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = CachedRun(run_table(run))
    done.warned = {str(warning.message): warning.category for warning in caught}
    if path is not None and path.parent.is_dir():  # a machine that does not see the folder leaves it to the caller
        write(done, path)
    return done


def write(done: CachedRun, path: Path) -> None:
    """Write one finished simulation, all of it or nothing."""
    told = {message: category.__name__ for message, category in done.warned.items()}
    table = pa.Table.from_pandas(done.table, preserve_index=False).replace_schema_metadata(
        {_WARNINGS: json.dumps(told).encode()}
    )
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        pq.write_table(table, part, compression="zstd")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> CachedRun | None:
    """What `write` wrote; None where there is no such file, or one that is damaged."""
    try:
        table = pq.read_table(path)
        told = json.loads(table.schema.metadata[_WARNINGS])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return CachedRun(table.to_pandas(), {message: _CATEGORIES.get(name, UserWarning) for message, name in told.items()})


def forget(folder: Path) -> None:
    """Remove every finished simulation from `folder`, and what an interrupted `write` left there."""
    for path in (*folder.glob("*.parquet"), *folder.glob("*.part")):
        path.unlink(missing_ok=True)


def _depends_on(run: Run, contents: Callable[[str], str]) -> Any:
    """The part of the resolved configuration that decides what `run` gives, files by content."""

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return contents(value) if is_input_path(value) else value

    elsewhere = {"name", "policies", "seeds", "sweep", "provenance", "warmup", "capacity"}
    resolved_config = run.config.model_dump(
        mode="json", exclude={**dict.fromkeys(elsewhere, True), "classes": {"__all__": {"slo"}}}
    )
    policy = {**run.config.policies[run.policy].model_dump(mode="json"), "label": None}
    return resolved({"config": resolved_config, "policy": policy, "seed": run.seed})


def _content(path: str) -> str:
    if os.path.isdir(path):  # gigabytes: when its files changed, and their sizes
        stamps = sorted((file.name, file_stamp(file)) for file in Path(path).iterdir())
        return hashlib.sha256(repr(stamps).encode()).hexdigest()
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def source_files() -> list[Path]:
    """Every file that a simulation's result may depend on: the code that runs in it and the data that ship."""
    files = sorted(Path(config.__path__[0]).parent.glob("*.py"))
    for package in (config, experiment, scheduler, sim, traces):
        files += sorted(path for path in Path(package.__path__[0]).rglob("*") if path.suffix in (".py", ".csv"))
    return files


@cache
def _sources() -> str:
    """A hash of `source_files`, stricter than a version number. They are read once: a process runs what it loaded."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.parent.name}/{path.name}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
