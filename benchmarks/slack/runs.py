"""Simulations of one policy, and what is counted of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from results_file import add_out

from qllm.config.config import Config
from qllm.config.from_config import cost_model, isolated, load_timings, popularity, scheduler_limits
from qllm.config.workload import request_trace
from qllm.scheduler import make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import Status
from qllm.traces.step_times.expected import expected_seconds

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: the other policies, with the settings of configs/long_prefill.yaml
OTHERS: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "priority": {},
    "chunked": {"budget": 512},
    "layer": {"fill_tokens": 0},
    "qllm": {"fill_tokens": 0},
    "hybrid": {"budget": 2048},
}
FOR_THROUGHPUT = ("fcfs", "priority", "chunked", "hybrid")


@dataclass
class Run:
    """One simulation; columns have one element a request, in seconds."""

    trace: RequestTrace
    ls: np.ndarray  #: whether it is of class ls
    served: np.ndarray  #: whether it was: else it was turned away
    ttft: np.ndarray
    tpot: np.ndarray
    turnaround: np.ndarray
    first_launch: np.ndarray  #: from its arrival
    queueing: np.ndarray
    alone_ttft: np.ndarray  #: on the idle device
    alone_tpot: np.ndarray
    met: np.ndarray  #: of LS alone: whether another LS request was there before the first token
    finish: np.ndarray
    makespan: float  #: from the first arrival to the last token
    busy: float  #: of which passes ran


def options(told: str | None, out: str) -> argparse.ArgumentParser:
    """The options of every script here; tables are printed wide."""
    pd.set_option("display.width", 220, "display.max_columns", 20)
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="sent in each run; default: as the configuration says")
    parser.add_argument("--jobs", type=int, default=2)
    add_out(parser, out)
    return parser


def drawn(config: Config, seed: int, only: str | None = None) -> RequestTrace:
    """The requests of a configuration; `only`: those of that class."""
    trace = request_trace(config, seed)
    if only is None:
        return trace
    mine = trace.cls == trace.classes.index(only)
    return RequestTrace(
        trace.arrival[mine], trace.prompt_tokens[mine], trace.output_tokens[mine], trace.cls[mine], trace.classes
    )


def run(config: Config, trace: RequestTrace, seed: int, policy: str, settings: dict[str, Any]) -> Run:
    """Simulate `trace` as `config` says, under a policy with these settings."""
    steps = cost_model(config)
    result = simulate(
        trace,
        priorities=config.priorities,
        policy=make_policy(policy, **settings),
        limits=scheduler_limits(config, load_timings(config.timings)),
        steps=steps,
        popularity=popularity(config),
        seed=seed,
        timeline=True,
    )
    expected = expected_seconds(steps)
    middle = trace.prompt_tokens + trace.output_tokens // 2
    gaps = np.where(trace.output_tokens > 1, trace.output_tokens - 1, np.nan)
    ls = trace.cls == trace.classes.index("ls")
    arrival, first, finish = result.arrival[ls], result.first_token[ls], result.finish[ls]
    met = np.array([((arrival < t) & (finish > a)).sum() > 1 for a, t in zip(arrival, first, strict=True)], dtype=bool)
    return Run(
        trace=trace,
        ls=ls,
        served=result.status == Status.FINISHED,
        ttft=result.first_token - result.arrival,
        tpot=(result.finish - result.first_token) / gaps,
        turnaround=result.finish - result.arrival,
        first_launch=result.first_launch - result.arrival,
        queueing=result.queueing,
        alone_ttft=isolated(config, trace.prompt_tokens),
        alone_tpot=np.array([expected((), 1, int(context)) for context in middle]),
        met=met,
        finish=result.finish,
        makespan=float(np.nanmax(result.finish) - result.arrival[0]),
        busy=sum(one.end - one.start for one in result.slices or ()),
    )


def pooled(runs: Sequence[Run], column: str, *, ls: bool) -> np.ndarray:
    """A column of the requests of class LS, or of all others, of all runs."""
    return np.concatenate([getattr(one, column)[one.ls == ls] for one in runs])


def p99(values: np.ndarray) -> float:
    """The 99th percentile of those that are numbers."""
    kept = values[~np.isnan(values)]
    return float(np.percentile(kept, 99)) if len(kept) else float("nan")


def capacity(config: Config, only: str | None = None) -> float:
    """Requests per second of the best policy for throughput, all requests (`only`: of a class) there at the start."""
    best = 0.0
    for policy in FOR_THROUGHPUT:
        runs = []
        for seed in config.seed_list:
            trace = drawn(config, seed, only)
            at_once = replace(trace, arrival=np.zeros(len(trace)))
            runs.append(run(config, at_once, seed, policy, OTHERS[policy]))
        best = max(best, throughput(runs))
    return best


def throughput(runs: Sequence[Run]) -> float:
    """Requests per second of all runs, each from its first arrival to its last token."""
    return sum(int(one.served.sum()) for one in runs) / sum(one.makespan for one in runs)
