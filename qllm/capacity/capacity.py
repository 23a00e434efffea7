"""Find the capacity of each policy of a configuration: searches on all cores, then tables of what was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

from qllm.capacity.search import Found, at_rate, find
from qllm.capacity.tables import Capacity, capacity_table, class_table, curve_table, price_of
from qllm.config.config import RATE, Config, load_config
from qllm.config.schema import Replay, Unscheduled
from qllm.config.workload import has_followers
from qllm.config.yaml_lines import ConfigError, load_yaml
from qllm.experiment.backends import parallel
from qllm.experiment.cache import CachedRun
from qllm.experiment.progress import progress as show_progress
from qllm.experiment.results import Results
from qllm.experiment.run import Run, runs, sweep_rows
from qllm.experiment.size import check_size
from qllm.experiment.sweep import Failure, attempt, provenance
from qllm.traces.messages import suggestion

_SEARCHED = 12  #: runs of a search that count as whole ones, for the estimate of how long it takes
_ABOVE = 1.25  #: where the curves end, over the highest capacity


def find_capacity(
    config: str | Path | Config,
    *,
    set: str | list[str] | tuple[str, ...] = (),
    policies: Sequence[str] = (),
    jobs: int = 1,
    backend: str = "local",
    progress: bool = False,
    any_size: bool = False,
    cut: bool = True,
) -> Capacity:
    """Find for each policy the highest rate at which every class meets its SLO and the device keeps up.

    A `rate` and a sweep of it are not used: the search chooses the rates. Other swept keys (timings, limits) stay: a
    capacity for each combination.

    Args:
        config: A YAML file, or a configuration that was loaded.
        set: Overrides keys of the file, e.g. ["capacity.attainment=0.95"].
        policies: Labels of those that are looked at; default: all.
        jobs: Processes that work in parallel; the results do not depend on it.
        backend: Where they run: "local", "ray" or "dask" (see qllm.experiment.backends).
        progress: Whether to show on stderr how far it is.
        any_size: Also what is estimated to take more than an hour, or more memory than there is.
        cut: End runs early that cannot meet an SLO any more; the results are the same without, later.

    Raises:
        ConfigError: The configuration is wrong or states no SLO; one line says where and what is allowed.
        TraceError: The same for a request trace, such as one whose requests all arrive at one instant.
        TimingError: The same for a timing trace.
        SchedulerError: The same for the limits or a policy's settings.
        SweepError: The workers cannot be reached, or were lost.
    """
    loaded = _checked(config, policies) if isinstance(config, Config) else load_for_capacity(config, set, policies)
    todo = runs(loaded)
    for run in todo:
        price_of(run.config)  # before hours of searching
    if not any_size:
        check_size(todo * _SEARCHED, todo, jobs)
    groups = _by_policy(todo)
    with show_progress("searching", len(todo) + len(groups), progress) as update:
        alone = list(_searched([[run] for run in todo], [()] * len(todo), cut, jobs, backend, update, 0))
        before = [[alone[number] for number in group] for group in groups]
        seeds = [[todo[number] for number in group] for group in groups]
        together = list(_searched(seeds, before, cut, jobs, backend, update, len(todo)))
        curve = _curve_runs(seeds, together, loaded.capacity.curve)
        update.phase("drawing the curves", len(curve))
        tables = _simulated(curve, jobs, backend, update)
    _tell(warned for one in [*alone, *together] for warned in one.warned.items())
    told = loaded.model_copy(update={"provenance": {**provenance(loaded), "capacity": "the search chose the rates"}})
    results = _results(told, curve, tables)
    found = capacity_table(seeds, together, before, results)
    return Capacity(found, class_table(told, found, results), _seed_table(todo, alone), curve_table(results), told)


def load_for_capacity(
    path: str | Path, overrides: str | list[str] | tuple[str, ...] = (), policies: Sequence[str] = ()
) -> Config:
    """Read a configuration as `load_config` does, for a search over the rate of these policies (default: all).

    It may leave out the rate. Raises ConfigError as `find_capacity` does.
    """
    given = [overrides] if isinstance(overrides, str) else list(overrides)
    file = load_yaml(path)
    for assignment in given:
        file.override(assignment)
    data = file.data
    swept = data.get("sweep")
    arrival = data.get("arrival")
    process = arrival.get("process") if isinstance(arrival, dict) else arrival
    if (
        data.get(RATE) is None
        and not (isinstance(swept, dict) and RATE in swept)
        and process not in ("batch", "closed")
    ):
        if process == "trace":
            raise file.error(
                ("arrival",),
                "a replayed trace keeps the rate that it was recorded at, and capacity is a search over the rate; "
                "allowed: a rate, such as rate: 1, which says that its time may be stretched",
            )
        given.append(f"{RATE}=1")
    return _checked(load_config(path, given), policies, f"{path}: ")


def _checked(config: Config, policies: Sequence[str], where: str = "") -> Config:
    """The configuration without a sweep of the rate, with these policies. ConfigError where no class has an SLO."""
    if all(job.slo is None for job in config.classes.values()):
        name = next(iter(config.classes))
        raise ConfigError(
            f"{where}classes: none has an slo, so that any rate would do; allowed: at least one, such as "
            f"classes.{name}.slo: {{ttft: 1.0}}"
        )
    process = config.arrival.process
    if isinstance(config.arrival, Unscheduled):
        raise ConfigError(
            f"{where}arrival: {process} has no rate, and capacity is a search over it; allowed: a process with one, "
            "such as poisson"
        )
    if config.warmup is not None and has_followers(config):
        raise ConfigError(
            f"{where}warmup: requests of {process} come when the last was answered; allowed: leave it out for capacity"
        )
    titles = [policy.title for policy in config.policies]
    for name in policies:
        if name not in titles:
            raise ConfigError(f"--policies {name}: {suggestion(name, titles)}")
    chosen = [policy for policy in config.policies if not policies or policy.title in policies]
    sweep = {key: values for key, values in config.sweep.items() if key != RATE}
    if isinstance(config.arrival, Replay) and config.rate is None and RATE not in config.sweep:
        raise ConfigError(
            f"{where}rate: this key is missing; a replayed trace's time is stretched only where one is given"
        )
    return config.model_copy(update={"sweep": sweep, "policies": chosen, "rate": 1.0})


def _by_policy(todo: Sequence[Run]) -> list[list[int]]:
    """The numbers of the runs of each point and policy, the seeds together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, run in enumerate(todo):
        groups.setdefault((*run.cells.items(), run.policy), []).append(number)
    return list(groups.values())


def _search(number: int, seeds: list[Run], before: Sequence[Found], cut: bool) -> tuple[int, Found]:
    return number, find(seeds, before, cut)


def _searched(
    seeds: Sequence[list[Run]],
    before: Sequence[Sequence[Found]],
    cut: bool,
    jobs: int,
    backend: str,
    update: Callable[[int, int | None], None],
    done: int,
) -> list[Found]:
    """What each search finds, in order."""
    found: dict[int, Found] = {}
    with parallel(backend, min(jobs, len(seeds))) as run_all:
        tasks = enumerate(zip(seeds, before, strict=True))
        for number, one in run_all(joblib.delayed(_search)(n, mine, known, cut) for n, (mine, known) in tasks):
            found[number] = one
            update(done + len(found), None)
    return [found[number] for number in range(len(seeds))]


def _curve_runs(seeds: Sequence[list[Run]], found: Sequence[Found], places: int) -> list[Run]:
    """Whole runs at each capacity, and at `places` rates around all of them."""
    highest = max(one.rate or one.saturation for one in found)
    rates = (np.arange(1, places + 1) / max(places, 1) * _ABOVE * highest).tolist()
    todo = []
    for mine, one in zip(seeds, found, strict=True):
        todo += [at_rate(run, rate) for rate in sorted({*rates, *([one.rate] if one.rate else [])}) for run in mine]
    return todo


def _simulated(
    todo: list[Run], jobs: int, backend: str, update: Callable[[int, int | None], None]
) -> list[CachedRun | Failure]:
    done: dict[int, CachedRun | Failure] = {}
    if not todo:
        return []
    with parallel(backend, min(jobs, len(todo))) as run_all:
        for number, one in run_all(joblib.delayed(attempt)(number, run, None) for number, run in enumerate(todo)):
            done[number] = one
            update(len(done), len(todo))
    for run, result in ((todo[number], one) for number, one in done.items()):
        if isinstance(result, Failure):
            raise result.error or RuntimeError(f"{run} failed:\n{result.traceback}")
    return [done[number] for number in range(len(todo))]


def _results(config: Config, todo: list[Run], tables: list[CachedRun | Failure]) -> Results:
    """Of the whole runs, as a sweep of the rate gives them."""
    rows = [
        sweep_rows(run, one.table).assign(rate=run.config.rate)
        for run, one in zip(todo, tables, strict=True)
        if isinstance(one, CachedRun)
    ]
    return Results.of(pd.concat(rows, ignore_index=True), config)


def _seed_table(todo: Sequence[Run], found: Sequence[Found]) -> pd.DataFrame:
    """A row per point, policy and seed."""
    return pd.DataFrame(
        [
            {
                "policy": run.title,
                **{key: value for key, value in run.cells.items() if key != RATE},
                "seed": run.seed,
                "rate_rps": one.rate,
                "saturation_rps": one.saturation,
                "failing_rps": one.failing,
                "limit": one.limit,
                "runs": one.runs,
                "cut": one.cut,
            }
            for run, one in zip(todo, found, strict=True)
        ]
    )


def _tell(warned: Iterator[tuple[str, type[Warning]]]) -> None:
    for message, category in dict(warned).items():
        warnings.warn(message, category, stacklevel=3)
