"""Sweeps: every point x seed x policy is one simulation of its own, run over as many processes as wanted."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qllm.build import isolated, load_timings, popularity, request_trace, scheduler_limits, step_model
from qllm.config import RATE, Config, load_config
from qllm.policies import blame
from qllm.results import Results
from qllm.yamlfile import ConfigError
from sim import SimResult, Status
from sim import simulate as run_simulation


@dataclass(frozen=True)
class Run:
    """One simulation: the configuration at a point of the sweep, the policy's index in it, and the seed."""

    config: Config
    point: dict[str, Any]
    policy: int
    seed: int

    def __str__(self) -> str:
        where = ", ".join(f"{key}={value}" for key, value in {**self.point, "seed": self.seed}.items())
        return f"policy {self.config.policies[self.policy].title} at {where}"


def simulate(
    config: str | Path | Config,
    *,
    set: list[str] | tuple[str, ...] = (),
    jobs: int = 1,
    progress: bool = False,
) -> Results:
    """Simulate a configuration (a YAML file, or one that was loaded): every point of its sweep, policy and seed.

    `set` overrides keys of the file, e.g. ["sweep.rate=[1,2,4]"]; `jobs` processes work in parallel, with the same
    results whatever their number. Raises ConfigError, TraceError, TimingError or SchedulerError, each one line.
    """
    if not isinstance(config, Config):
        config = load_config(config, set)
    todo = runs(config)
    tables: list[pd.DataFrame] = []
    told: dict[str, type[Warning]] = {}
    parallel = joblib.Parallel(n_jobs=min(jobs, len(todo)), return_as="generator")
    with _bar(len(todo), progress) as advance:
        for table, warned in parallel(joblib.delayed(run_table)(run) for run in todo):
            tables.append(table)
            told.update(warned)
            advance()
    for message, category in told.items():
        warnings.warn(message, category, stacklevel=2)
    requests = pd.concat(tables, ignore_index=True)
    return Results.of(requests, config.model_copy(update={"provenance": provenance(config)}))


def runs(config: Config) -> list[Run]:
    """Every simulation of the sweep in the order of the tables: points, then policies, then seeds."""
    found = []
    for point in config.points():
        at_point = config.at(point)
        found += [
            Run(at_point, point, policy, seed)
            for policy in range(len(at_point.policies))
            for seed in at_point.seed_list
        ]
    return found


def run_table(run: Run) -> tuple[pd.DataFrame, dict[str, type[Warning]]]:
    """Simulate `run`. Returns its rows of requests.parquet, and the warnings, which would be lost in a worker."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = _table(run, run_one(run))
    return table, {str(warning.message): warning.category for warning in caught}


def run_one(run: Run, timeline: bool = False) -> SimResult:
    """Simulate `run`. An exception of a user's policy comes out as a ConfigError that names its file and line."""
    config = run.config
    policy = config.policies[run.policy]
    trace = request_trace(config, run.seed)
    limits = scheduler_limits(config, load_timings(config.timings))
    try:
        return run_simulation(
            trace,
            priorities={name: job.priority for name, job in config.classes.items()},
            policy=policy.build(),
            limits=limits,
            steps=step_model(config),
            popularity=popularity(config),
            seed=run.seed,
            timeline=timeline,
        )
    except Exception as error:
        if policy.file is None:
            raise
        raise ConfigError(f"{run}: {blame(error, policy.file)}") from None


def _table(run: Run, result: SimResult) -> pd.DataFrame:
    """Rows of requests.parquet for one run; text columns are categories, which keeps 100,000 requests small."""
    config = run.config
    trace = request_trace(config, run.seed)
    n = len(trace)

    def text(codes: Any, names: list[str]) -> Any:
        return pd.Categorical.from_codes(np.asarray(codes, dtype=np.int8), categories=pd.Index(names))

    rate = config.rate if config.rate is not None else trace.rate
    columns: dict[str, Any] = {
        "policy": text(np.full(n, run.policy), [policy.title for policy in config.policies]),
        "rate": np.full(n, np.nan if rate is None else rate),
        **{key: np.full(n, _plain(value)) for key, value in run.point.items() if key != RATE},
        "seed": np.full(n, run.seed, dtype=np.int64),
        "id": np.arange(n),
        "class": text([list(config.classes).index(trace.classes[i]) for i in trace.cls], list(config.classes)),
        "arrival_s": result.arrival,
        "prompt_tokens": trace.prompt_tokens,
        "output_tokens": trace.output_tokens,
        "first_launch_s": result.first_launch,
        "first_token_s": result.first_token,
        "finish_s": result.finish,
        "queueing_s": result.queueing,
        "running_s": result.running,
        "suspended_s": result.suspended,
        "preemptions": np.asarray(result.preemptions, dtype=np.int64),
        "evictions": np.asarray(result.evictions, dtype=np.int64),
        "isolated_ttft_s": isolated(config, trace.prompt_tokens),
        "status": text(result.status, [status.name.lower() for status in Status]),
        "reason": [result.reasons.get(i, "") for i in range(n)],
    }
    return pd.DataFrame(columns)


def _plain(value: Any) -> Any:
    """A swept value as a table's cell: numbers and text stay, the rest becomes text."""
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else str(value)


def provenance(config: Config) -> dict[str, str]:
    """What the results depend on besides the configuration: versions, and the timing trace's source and content."""
    timings = load_timings(config.timings)
    digest = hashlib.sha256(repr(timings).encode() + repr(timings.points).encode()).hexdigest()[:16]
    return {
        "qllm": _version("qllm-moe"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "pandas", "pyarrow", "simpy")},
        "timings": f"{timings.name}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}",
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


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    """A progress bar on stderr that goes away at the end; yields what to call after each simulation."""
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
