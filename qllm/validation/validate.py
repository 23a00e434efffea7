"""The same requests on the real engine and in the simulator, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qllm.config.from_config import load_timings
from qllm.config.workload import check_for_engine, request_trace
from qllm.executor.engine.clock import RealClock
from qllm.executor.engine.replay import replay
from qllm.executor.model.loading import LoadedModel
from qllm.experiment.engine_run import engine_limits
from qllm.experiment.engines import Engines
from qllm.experiment.estimates import percentile
from qllm.experiment.metrics import per_request
from qllm.experiment.run import Run, request_table
from qllm.scheduler import Limits
from qllm.sim import ResampledRouting, simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import PassCost, PassCostModel

METRICS = ("ttft_s", "tpot_s", "turnaround_s")
STATISTICS = ("mean", "p50", "p95", "p99")
WARM_UP = 8  # requests replayed first and not counted: kernels are chosen and compiled at their first sizes
REAL, SIMULATED = "real", "simulated"
#: of `request_rows`, and of requests.csv
COLUMNS = (
    *("policy", "rate", "seed", "world", "id", "class", "arrival_s", "prompt_tokens", "output_tokens"),
    *("first_launch_s", "first_token_s", "finish_s", "preemptions", *METRICS, "blocking_s"),
)


class PassCall(NamedTuple):
    """A pass as the cost model was asked for it: tokens of prompts, sequences that decode, and its answer."""

    prompt_tokens: int
    n_decode: int
    cost: PassCost


class RecordingCostModel(PassCostModel):
    """A cost model that keeps the passes it was asked for in `calls`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls: list[PassCall] = []

    def cost(self, prefill: Sequence[tuple[Any, int, int]], n_decode: int, *args: Any, **kwargs: Any) -> PassCost:
        """As PassCostModel.cost."""
        cost = super().cost(prefill, n_decode, *args, **kwargs)
        self.calls.append(PassCall(sum(new for _, new, _ in prefill), n_decode, cost))
        return cost


@dataclass(frozen=True)
class EngineRun:
    """One run on the real engine."""

    run: Run
    trace: RequestTrace
    limits: Limits
    steps: PassCostModel = field(repr=False)  # split the passes, from the configuration's timing trace
    result: RunResult = field(repr=False)
    calls: list[PassCall] = field(repr=False)  # in the order of `result.routing`


@dataclass(frozen=True)
class Comparison:
    """One run on the real engine (`real`), and what became of the same requests in the simulator (`simulated`)."""

    real: EngineRun
    simulated: RunResult = field(repr=False)

    def requests(self) -> pd.DataFrame:
        """A row per request and world (REAL, SIMULATED) with COLUMNS; times in seconds."""
        run, trace = self.real.run, self.real.trace
        worlds = ((REAL, self.real.result), (SIMULATED, self.simulated))
        return pd.concat([request_rows(run, trace, result, world) for world, result in worlds], ignore_index=True)


def request_rows(run: Run, trace: RequestTrace, result: RunResult, world: str) -> pd.DataFrame:
    """A row per request with COLUMNS."""
    table = request_table(run, trace, result, np.full(len(trace), np.nan))
    table["class"] = np.array(list(run.config.classes))[table["class"]]
    return per_request(table.assign(policy=run.title, world=world))[list(COLUMNS)]


def compare(run: Run, loaded: LoadedModel, engines: Engines | None = None) -> Comparison:
    """Replay one run of a configuration on the real engine, then simulate it. `engines`: see `replay_run`.

    The configuration's timing trace splits the engine's passes and gives the simulator its times. Each simulated pass
    is routed like a real one of this run. Raises as `replay` and the configuration do.
    """
    real = replay_run(run, loaded, engines)
    simulated = simulate(
        real.trace,
        priorities=run.config.priorities,
        policy=run.config.policies[run.policy].build(),
        limits=real.limits,
        steps=PassCostModel(real.steps.timings, max_step=run.config.max_step, expert_mode=run.config.expert_mode),
        routing=ResampledRouting(real.result.routing or [], real.steps.timings.top_k, real.steps.layers, run.seed),
        seed=run.seed,
        timeline=True,
    )
    return Comparison(real, simulated)


def replay_run(run: Run, loaded: LoadedModel, engines: Engines | None = None) -> EngineRun:
    """Replay one run on the real clock, on one of the `engines` for this model or on an engine of its own.

    The engine polls while idle, as in a calibration. What it records for a GPU it has recorded before.
    """
    config = run.config
    check_for_engine(config)
    trace = request_trace(config, run.seed)
    limits = engine_limits(loaded, config)
    steps = RecordingCostModel(load_timings(config.timings), max_step=config.max_step, expert_mode=config.expert_mode)
    policy = config.policies[run.policy].build()
    clock = RealClock(steps, polls=True)
    with (engines or Engines(loaded, kept=False)).engine(policy, limits, clock, seed=run.seed) as engine:
        replay(engine, trace.head(min(WARM_UP, len(trace))), priorities=config.priorities, seed=run.seed)
        steps.calls.clear()
        result = replay(engine, trace, priorities=config.priorities, seed=run.seed)
        return EngineRun(run, trace, engine.limits, steps, result, list(steps.calls))


def errors(requests: pd.DataFrame) -> pd.DataFrame:
    """How far the simulation is off, over the `Comparison.requests` of all seeds.

    A row per policy, rate, class (all of them too: "all", or "(all)" where a class is called that), metric and
    statistic: real, simulated, error = simulated / real - 1 (preemptions: the difference). Throughput: requests per
    second from first arrival to last token.
    """
    rows = []
    everybody = "(all)" if "all" in set(requests["class"]) else "all"
    pooled = pd.concat([requests, requests.assign(**{"class": everybody})])
    for (policy, rate, cls), group in pooled.groupby(["policy", "rate", "class"], sort=False):
        real, simulated = (_statistics(group[group["world"] == world]) for world in (REAL, SIMULATED))
        for (metric, name), value in real.items():
            other = simulated[metric, name]
            error = other - value if metric == "preemptions" else other / value - 1
            rows.append([policy, rate, cls, metric, name, value, other, error])
    return pd.DataFrame(rows, columns=["policy", "rate", "class", "metric", "statistic", REAL, SIMULATED, "error"])


def _statistics(requests: pd.DataFrame) -> dict[tuple[str, str], float]:
    """By (metric, statistic), of the requests of one world."""
    found = {(metric, name): statistic(requests[metric], name) for metric in METRICS for name in STATISTICS}
    spans = requests.groupby("seed").agg(first=("arrival_s", "min"), last=("finish_s", "max"))
    finished = requests["finish_s"].notna().sum()
    found["throughput_rps", "mean"] = float(finished / (spans["last"] - spans["first"]).sum())
    found["preemptions", "sum"] = float(requests["preemptions"].sum())
    return found


def statistic(values: pd.Series, name: str) -> float:
    """The mean, or a percentile such as "p99", of the values that there are."""
    return float(values.mean()) if name == "mean" else percentile(values, int(name[1:]))
