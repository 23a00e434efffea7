"""One simulation of a sweep: from its configuration to a row per request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qllm.config.config import RATE, Config
from qllm.config.from_config import cost_model, isolated, load_timings, popularity, scheduler_limits
from qllm.config.policies import describe_failure, watched
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.sim import Status
from qllm.sim import simulate as run_simulation
from qllm.sim.simulate import Stop
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.wants import BOUNDS, cell_of

LAST_ARRIVAL_S = 1e8  #: of a simulation: three years
SOURCE = "timings_source"  #: column of a sweep over timing traces: measured, imported or modelled, for each row


@dataclass(frozen=True)
class Run:
    """One simulation: the configuration at a point of the sweep, the policy's index in it, and the seed."""

    config: Config
    point: dict[str, Any]
    policy: int
    seed: int
    cells: dict[str, int | float | str]  #: the point's values as tables have them

    @property
    def title(self) -> str:
        """The policy's name in tables."""
        return self.config.policies[self.policy].title

    def __str__(self) -> str:
        where = ", ".join(f"{key}={value}" for key, value in {**self.cells, "seed": self.seed}.items())
        return f"policy {self.title} at {where}"


def runs(config: Config) -> list[Run]:
    """Every simulation of the sweep in the order of the tables: points, then policies, then seeds."""
    found = []
    for point, cells in zip(config.points(), config.point_cells(), strict=True):
        at_point = config.at(point)
        found += [
            Run(at_point, point, policy, seed, cells)
            for policy in range(len(at_point.policies))
            for seed in at_point.seed_list
        ]
    return found


def simulate_run(
    run: Run, trace: RequestTrace, timeline: bool = False, stop: Stop | None = None, load: bool = False
) -> RunResult:
    """Simulate `run` on `trace`, with `timeline`, `load` and `stop` as `qllm.sim.simulate` has them.

    ConfigError for an exception of a user's policy.
    """
    config = run.config
    policy = config.policies[run.policy]
    limits = scheduler_limits(config, load_timings(config.timings))
    if len(trace) and trace.arrival[-1] > LAST_ARRIVAL_S:
        raise ConfigError(
            f"rate: the last request arrives after {trace.arrival[-1]:.3g} s; allowed: {LAST_ARRIVAL_S:g} s, beyond "
            "which microseconds are lost in the clock's rounding"
        )
    try:
        with watched(policy.file):
            return run_simulation(
                trace,
                priorities=config.priorities,
                policy=[policy.build() for _ in range(config.replicas)],
                router=config.router,
                limits=limits,
                steps=cost_model(config),
                popularity=popularity(config),
                seed=run.seed,
                timeline=timeline,
                load=load,
                stop=stop,
                prefix_cache=config.limits.prefix_cache,
            )
    except (Exception, SystemExit) as error:
        if policy.file is None:
            raise
        raise ConfigError(f"{run}: {describe_failure(error, policy.file)}") from None


def run_table(run: Run) -> pd.DataFrame:
    """Simulate `run`: a row per request, without the names that only this sweep has for it (see `sweep_rows`)."""
    trace = request_trace(run.config, run.seed)
    result = simulate_run(run, trace)
    served = result.status != Status.REJECTED  # the others' prompts may be of any length
    alone = np.full(len(trace), np.nan)
    alone[served] = isolated(run.config, trace.prompt_tokens[served])
    return request_table(run, trace, result, alone)


def request_table(run: Run, trace: RequestTrace, result: RunResult, isolated_ttft: np.ndarray) -> pd.DataFrame:
    """A row per request, `isolated_ttft` in seconds, float64[n]; classes and statuses as numbers, for any format."""
    n, names = len(trace), list(run.config.classes)
    return pd.DataFrame(
        {
            "rate": np.full(n, rate_of(run, trace)),
            "seed": np.full(n, run.seed, dtype=np.int64),
            "id": np.arange(n),
            "class": np.array([names.index(name) for name in trace.classes], dtype=np.int16)[trace.cls],
            "arrival_s": result.arrival,
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
            **_wanted(trace),
            "first_launch_s": result.first_launch,
            "first_token_s": result.first_token,
            "finish_s": result.finish,
            "queueing_s": result.queueing,
            "running_s": result.running,
            "suspended_s": result.suspended,
            "preemptions": np.asarray(result.preemptions, dtype=np.int64),
            "evictions": np.asarray(result.evictions, dtype=np.int64),
            "kv_peak": np.full(n, result.kv_peak),
            "isolated_ttft_s": isolated_ttft,
            **({} if result.cached is None else {"cached_tokens": result.cached}),
            **({} if result.replica is None else {"replica": result.replica}),
            "status": np.asarray(result.status, dtype=np.int8),
            "reason": [result.reasons.get(i, "") for i in range(n)],
        }
    )


def _wanted(trace: RequestTrace) -> dict[str, Any]:
    """What requests want, in the columns that the trace has: seconds, nan for no bound; text, "" for nothing."""
    found: dict[str, Any] = dict(trace.wanted())
    for name, column in found.items():
        if name in BOUNDS:
            found[name] = np.array(column, dtype=np.float64)
        else:
            found[name] = [cell_of(value) if isinstance(value, dict) else value or "" for value in column]
    return found


def rate_of(run: Run, trace: RequestTrace) -> float:
    """Requests per second offered; 0 where all arrive at one instant: a batch has no rate."""
    return run.config.offered_rate or trace.rate or 0.0


def sweep_rows(run: Run, found: pd.DataFrame) -> pd.DataFrame:
    """The rows of requests.parquet for a `run_table`; text is categories, which keeps 100,000 requests small."""
    config, n = run.config, len(found)

    def text(codes: Any, names: list[str]) -> Any:
        return pd.Categorical.from_codes(np.asarray(codes, dtype=np.int16), categories=pd.Index(names))

    named = {
        "class": text(found["class"], list(config.classes)),
        "status": text(found["status"], [status.name.lower() for status in Status]),
    }
    named |= {name: pd.Categorical(found[name]) for name in ("tenant", "tags") if name in found}
    columns = {name: named.get(name, found[name]) for name in found.columns}
    return pd.DataFrame(
        {
            "policy": text(np.full(n, run.policy), [policy.title for policy in config.policies]),
            RATE: columns.pop(RATE),
            **{key: np.full(n, value) for key, value in run.cells.items() if key != RATE},
            **({SOURCE: text(np.zeros(n), [load_timings(config.timings).source])} if "timings" in run.point else {}),
            **columns,
        }
    )
