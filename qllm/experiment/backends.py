"""Where simulations run: processes of this machine, or a Ray or Dask cluster, through joblib."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal, get_args

import joblib

from qllm.config.yaml_lines import ConfigError
from qllm.errors import SweepError
from qllm.traces.messages import suggestion

Backend = Literal["local", "ray", "dask"]


@contextmanager
def parallel(backend: str, jobs: int) -> Iterator[joblib.Parallel]:
    """A joblib.Parallel of `jobs` workers, each result handed over as soon as the backend can.

        local  processes of this machine
        ray    the cluster that RAY_ADDRESS names, else one of `jobs` processes on this machine
        dask   all workers of the scheduler that DASK_SCHEDULER_ADDRESS names, else `jobs` processes on this machine. A
               lost worker's tasks go to the others; one that kills each of them is waited for without end (joblib 1.6
               is not told): interrupt, and the rest is kept

    A cluster's machines must see the configuration's files under the same paths. ConfigError: the backend is unknown or
    not installed. SweepError: the cluster cannot be reached, or a worker is lost for good.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"--backend {backend}: {suggestion(backend, list(get_args(Backend)))}")
    if backend == "ray":
        with _ray(jobs), joblib.parallel_config("ray"):
            yield joblib.Parallel(n_jobs=jobs)  # its pool gives results only all together
    elif backend == "dask":
        with _dask(jobs), joblib.parallel_config("dask"):
            yield joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    else:
        try:
            yield joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
        except BrokenProcessPool:
            raise _lost(backend) from None


@contextmanager
def _ray(jobs: int) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use over the network otherwise
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise _missing("ray", "ray") from None
    register_ray()
    started = not ray.is_initialized()
    if started:
        here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": jobs, "include_dashboard": False}
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **here)
        except (OSError, RuntimeError) as error:
            raise SweepError(f"--backend ray: no cluster at {os.environ.get('RAY_ADDRESS', 'home')}: {error}") from None
    try:
        yield
    except ray.exceptions.RayError:
        raise _lost("ray") from None
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _dask(jobs: int) -> Iterator[None]:
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise _missing("dask", "dask[distributed]") from None
    address = dask.config.get("scheduler-address", None)
    try:
        client = Client() if address else Client(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
    except OSError as error:
        raise SweepError(f"--backend dask: no scheduler at {address or 'home'}: {error}") from None
    with client:
        yield


def _lost(backend: str) -> SweepError:
    return SweepError(f"--backend {backend}: a worker died, perhaps for lack of memory; allowed: fewer --jobs")


def _missing(backend: str, package: str) -> ConfigError:
    return ConfigError(f"--backend {backend}: not installed; install it with: pip install '{package}'")
