"""Where simulations run: processes of this machine, or a Ray or Dask cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal, get_args

import joblib

from qllm.config.yaml_lines import ConfigError
from qllm.errors import SweepError
from qllm.traces.messages import suggestion

Backend = Literal["local", "ray", "dask"]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  #: what `joblib.delayed` makes
RunAll = Callable[[Iterable[Call]], Iterator[Any]]  #: hands over the results in any order

_TRIES = 2  #: pools of processes in a row that may finish nothing
_AHEAD = 4  #: calls that a cluster has for each worker: a queue of all of them would take memory


@contextmanager
def parallel(backend: str, jobs: int) -> Iterator[RunAll]:
    """What runs calls made by `joblib.delayed` on `jobs` workers and hands over each result when it is there.

        local  processes of this machine
        ray    the cluster that RAY_ADDRESS names, else one of `jobs` processes on this machine
        dask   all workers of the scheduler that DASK_SCHEDULER_ADDRESS names, else `jobs` processes on this machine

    What a lost worker had in hand is run again. A call that takes worker after worker with it is given up: ray and dask
    after four tries, local processes once `_TRIES` pools in a row finished nothing.

    A cluster's machines must see the configuration's files under the same paths. ConfigError: the backend is unknown or
    not installed. SweepError: the cluster cannot be reached, or a call was given up.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"--backend {backend}: {suggestion(backend, list(get_args(Backend)))}")
    if backend == "ray":
        with _ray(jobs) as run_all:
            yield run_all
    elif backend == "dask":
        with _dask(jobs) as run_all:
            yield run_all
    else:
        yield partial(_run_locally, jobs=jobs)


def _call(number: int, call: Call) -> tuple[int, Any]:
    function, args, named = call
    return number, function(*args, **named)


def _run_locally(calls: Iterable[Call], jobs: int) -> Iterator[Any]:
    left = dict(enumerate(calls))
    tries = _TRIES
    while left:
        before = len(left)
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
        try:
            for number, result in pool([joblib.delayed(_call)(*one) for one in left.items()]):
                del left[number]
                yield result
        except BrokenProcessPool:
            tries = _TRIES if len(left) < before else tries - 1
            if not tries:
                raise _lost("local") from None
            left = dict(reversed(left.items()))  # what may have killed the worker comes last


@contextmanager
def _ray(jobs: int) -> Iterator[RunAll]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use over the network otherwise
    try:
        import ray
    except ImportError:
        raise _missing("ray", "ray") from None
    started = not ray.is_initialized()
    if started:
        here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": jobs, "include_dashboard": False}
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **here)
        except (OSError, RuntimeError) as error:
            raise SweepError(f"--backend ray: no cluster at {os.environ.get('RAY_ADDRESS', 'home')}: {error}") from None
    remote = ray.remote(max_retries=3)(_call)

    def run_all(calls: Iterable[Call]) -> Iterator[Any]:
        todo = enumerate(calls)
        running = [remote.remote(*one) for one in islice(todo, _AHEAD * jobs)]
        while running:
            done, running = ray.wait(running)
            for reference in done:
                yield ray.get(reference)[1]
                running += [remote.remote(*one) for one in islice(todo, 1)]

    try:
        yield run_all
    except ray.exceptions.RayError:
        raise _lost("ray") from None
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _dask(jobs: int) -> Iterator[RunAll]:
    try:
        import dask
        from distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise _missing("dask", "dask[distributed]") from None
    address = dask.config.get("scheduler-address", None)
    try:
        client = Client() if address else Client(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
    except OSError as error:
        raise SweepError(f"--backend dask: no scheduler at {address or 'home'}: {error}") from None

    def run_all(calls: Iterable[Call]) -> Iterator[Any]:
        todo = enumerate(calls)
        ahead = _AHEAD * max(jobs, sum(client.ncores().values()))
        running = as_completed([client.submit(_call, *one, pure=False) for one in islice(todo, ahead)])
        for future in running:
            yield future.result()[1]
            for one in islice(todo, 1):
                running.add(client.submit(_call, *one, pure=False))

    with client:
        try:
            yield run_all
        except KilledWorker:
            raise _lost("dask") from None


def _lost(backend: str) -> SweepError:
    return SweepError(f"--backend {backend}: a worker died, perhaps for lack of memory; allowed: fewer --jobs")


def _missing(backend: str, package: str) -> ConfigError:
    return ConfigError(f"--backend {backend}: not installed; install it with: pip install '{package}'")
