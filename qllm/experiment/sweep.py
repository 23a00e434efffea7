"""Sweeps: every point x seed x policy is one simulation of its own, run over as many processes as wanted."""

from __future__ import annotations

import hashlib
import os
import platform
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import joblib
import pandas as pd

from qllm.config.config import Config, load_config
from qllm.config.from_config import load_timings
from qllm.errors import EXPECTED
from qllm.experiment.backends import parallel
from qllm.experiment.cache import CachedRun, finish, keys, read, write
from qllm.experiment.progress import progress as show_progress
from qllm.experiment.results import Results, make_folder
from qllm.experiment.run import Run, runs, sweep_rows
from qllm.experiment.size import check_size

SEVERAL = " | "  #: between the timing traces that a sweep uses, where its provenance names them
Task = tuple[int, Run, Path | None]  #: number in the sweep, the simulation, and where what it gives is kept


@dataclass
class Failure:
    """A simulation that ended in an exception: a typed error, or whatever else with its traceback as text."""

    message: str
    error: Exception | None
    traceback: str = ""


def simulate(
    config: str | Path | Config,
    *,
    set: str | list[str] | tuple[str, ...] = (),
    jobs: int = 1,
    backend: str = "local",
    keep: str | Path | None = None,
    progress: bool = False,
    any_size: bool = False,
) -> Results:
    """Simulate a configuration: every point of its sweep, policy and seed.

    A simulation that fails stops no other: it stands in the results' `failures`, and a warning says so. Where nothing
    succeeds, the first error is raised.

    Args:
        config: A YAML file, or a configuration that was loaded.
        set: Overrides keys of the file, e.g. ["sweep.rate=[1,2,4]"].
        jobs: Processes that work in parallel; the results do not depend on it.
        backend: Where they run: "local", "ray" or "dask" (see qllm.experiment.backends).
        keep: Folder for finished simulations; those that are there already are not run again.
        progress: Whether to show on stderr how far it is: a bar, or a line every 10 s where that is no terminal.
        any_size: Also what is estimated to take more than an hour, or more memory than there is.

    Returns:
        Tables of requests, of the summary and of what failed, with the resolved configuration.

    Raises:
        ConfigError: The configuration is wrong, or asks for too much; one line says where and what is allowed.
        TraceError: The same for a request trace.
        TimingError: The same for a timing trace.
        SchedulerError: The same for the limits or a policy's settings.
        SweepError: The workers cannot be reached, or were lost.
    """
    if not isinstance(config, Config):
        config = load_config(config, set)
    todo = _tasks(config, keep)
    done: dict[int, CachedRun | Failure] = {}
    for number, _, file in todo:
        kept = read(file) if file else None
        if kept:
            done[number] = kept
    left = [task for task in todo if task[0] not in done]
    if not any_size:
        check_size([run for _, run, _ in left], [run for _, run, _ in todo], jobs)
    with show_progress("simulating", len(todo), progress) as update:
        update(len(done), len(todo))
        for number, result in _simulated(left, backend, jobs):
            done[number] = result
            update(len(done), len(todo))
    return _results(config, [(run, done[number]) for number, run, _ in todo])


def _tasks(config: Config, keep: str | Path | None) -> list[Task]:
    todo = runs(config)
    if keep is None:
        return [(number, run, None) for number, run in enumerate(todo)]
    folder = make_folder(keep)
    names = keys(todo)
    return [(number, run, folder / f"{names[number]}.parquet") for number, run in enumerate(todo)]


def attempt(number: int, run: Run, file: Path | None) -> tuple[int, CachedRun | Failure]:
    """Do a worker's job: simulate `run` and keep what it gives in `file`. An exception becomes a Failure."""
    try:
        return number, finish(run, file)
    except Exception as error:
        typed = isinstance(error, EXPECTED)
        message = str(error).removeprefix(f"{run}: ") if typed else f"{type(error).__name__}: {error}"
        text = "" if typed else traceback.format_exc()
        return number, Failure(_without_home(" ".join(message.split())), error if typed else None, text)


def _without_home(message: str) -> str:
    """`message` with paths as others may read them: from here, or from "~"."""
    for folder, short in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if len(folder) > 1:
            message = message.replace(f"{folder}{os.sep}", short)
    return message


def _simulated(todo: list[Task], backend: str, jobs: int) -> Iterator[tuple[int, CachedRun | Failure]]:
    """Simulate `todo`, handing over each result when it is there, in any order."""
    if not todo:
        return
    files = {number: file for number, _, file in todo}
    with parallel(backend, min(jobs, len(todo))) as run_all:
        for number, result in run_all(joblib.delayed(attempt)(*task) for task in todo):
            file = files[number]
            if file is not None and isinstance(result, CachedRun) and not file.exists():
                write(result, file)  # the worker's machine does not see the folder
            yield number, result


def _results(config: Config, done: list[tuple[Run, CachedRun | Failure]]) -> Results:
    """The tables, after warnings of what the simulations warned of and of what failed."""
    tables = [sweep_rows(run, result.table) for run, result in done if isinstance(result, CachedRun)]
    failed = [(run, result) for run, result in done if isinstance(result, Failure)]
    if not tables:
        first = failed[0][1]
        raise first.error or RuntimeError(f"{failed[0][0]} failed:\n{first.traceback}")
    told = {
        message: kind for _, result in done if isinstance(result, CachedRun) for message, kind in result.warned.items()
    }
    for message, category in told.items():
        warnings.warn(message, category, stacklevel=3)
    if failed:
        text = f"{len(failed)} of {len(done)} simulations failed; first {failed[0][0]}: {failed[0][1].message}"
        warnings.warn(text, stacklevel=3)
    failures = [
        {"policy": run.title, **run.cells, "seed": run.seed} | {"error": result.message} for run, result in failed
    ]
    requests = pd.concat(tables, ignore_index=True)
    return Results.of(requests, config.model_copy(update={"provenance": provenance(config)}), pd.DataFrame(failures))


def provenance(config: Config) -> dict[str, str]:
    """What the results depend on besides the configuration: versions, and the timing trace's source and content."""
    swept = config.sweep.get("timings", [config.timings])
    used = [load_timings(name) for name in swept]
    told = [f"{timings.name}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}" for timings in used]
    digest = hashlib.sha256(b"".join(repr(t).encode() + repr(t.points).encode() for t in used)).hexdigest()[:16]
    return {
        "qllm": _version("qllm-moe"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "pandas", "pyarrow", "simpy")},
        "timings": SEVERAL.join(told),
        "timings_sha256": digest,
    }


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not as it was when a written configuration was run: ['numpy: 2.4.6 then, 2.5.0 now']."""
    return [f"{key}: {was} then, {now[key]} now" for key, was in before.items() if key in now and now[key] != was]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
