"""The same requests on the real engine and in the simulator, and how far they are apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from qllm.config.config import Config
from qllm.config.from_config import load_timings, request_trace, scheduler_limits
from qllm.executor.calibration.profiler import Visit
from qllm.executor.engine.asides import PausingClock, asides
from qllm.executor.engine.engine import Engine, blocks_in
from qllm.executor.engine.replay import replay
from qllm.experiment.metrics import per_request
from qllm.experiment.run import Run, rate_of, request_table
from qllm.scheduler import Limits
from qllm.sim import Pace, ResampledRouting, simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult
from qllm.traces.step_times.cost_model import PassCost, PassCostModel
from qllm.traces.step_times.timings import Timings
from qllm.validation.machine_speed import (
    Call,
    PassSeconds,
    Slowed,
    Speed,
    Visited,
    at_speed,
    cost_of_call,
    mean_speed,
    pace_of,
    speed_of,
)

METRICS = ("ttft_s", "tpot_s", "turnaround_s")
STATISTICS = ("mean", "p50", "p95", "p99")
AT_ONCE = 6  # visits of a calibration in a run: about half a second of passes on a CPU
WARM_UP = 8  # requests replayed first and not counted: kernels are chosen and compiled at their first sizes
REAL, SIMULATED, AT_SPEED = "real", "simulated", "at_speed"
#: of `request_rows`, and of requests.csv
COLUMNS = (
    *("policy", "rate", "seed", "world", "id", "class", "arrival_s", "prompt_tokens", "output_tokens"),
    *("first_launch_s", "first_token_s", "finish_s", "preemptions", *METRICS, "blocking_s"),
)


class Asked(PassCostModel):
    """A step model that remembers the passes it was asked to cut."""

    calls: list[Call]

    def cost(
        self,
        prefill: Sequence[tuple[Any, int, int]],
        n_decode: int,
        decode_context: int,
        rows: int,
        moved_tokens: int = 0,
        after_prefill: bool = False,
    ) -> PassCost:
        """As PassCostModel.cost."""
        cost = super().cost(prefill, n_decode, decode_context, rows, moved_tokens, after_prefill)
        chunks = tuple((new, cached) for _, new, cached in prefill)
        self.calls.append(Call(chunks, n_decode, decode_context, rows, cost, after_prefill))
        return cost


class EngineRun(NamedTuple):
    """One run on the real engine. calls: its passes, in the order of `real.routing`, as the step model that cut them
    saw them. visits: those of a calibration that was made in it."""

    run: Run
    trace: RequestTrace
    limits: Limits
    real: RunResult
    calls: list[Call]
    visits: list[Visited]


@dataclass
class Comparison:
    """One run in both worlds. calls: the real run's passes, in the order of `real.routing`, as `steps` predicts them.

    passes: what each real pass took and what is predicted for it. at_speed: simulated once more at the speed that the
    machine had: from moment to moment, as the visits of a calibration in the run saw it, or, where there are none, over
    the whole run, as its own passes show it (`speed`, against `steps`). How the machine's speed changes is in the
    errors of `simulated`, and not in those of `at_speed`, which are the simulator's own: how passes are made, queue,
    preempt and share their time.
    """

    run: Run
    trace: RequestTrace
    real: RunResult
    simulated: RunResult
    steps: PassCostModel
    calls: list[Call] = field(repr=False)
    passes: list[PassSeconds] = field(repr=False)
    speed: Speed
    at_speed: RunResult

    @property
    def rate(self) -> float:
        """Requests per second offered."""
        return rate_of(self.run, self.trace)

    def requests(self) -> pd.DataFrame:
        """`request_rows` of both worlds."""
        worlds = {REAL: self.real, SIMULATED: self.simulated, AT_SPEED: self.at_speed}
        rows = [request_rows(self.run, self.trace, result, world) for world, result in worlds.items()]
        return pd.concat(rows, ignore_index=True)


def request_rows(run: Run, trace: RequestTrace, result: RunResult, world: str) -> pd.DataFrame:
    """A row per request with COLUMNS."""
    table = request_table(run, trace, result, np.full(len(trace), np.nan))
    table["class"] = np.array(list(run.config.classes))[table["class"]]
    return per_request(table.assign(policy=run.title, world=world))[list(COLUMNS)]


def compare(run: Run, model: PreTrainedModel) -> Comparison:
    """Replay one run of a configuration on the real engine and simulate it with the configuration's timing trace.

    Raises what `replay` and `simulate` raise.
    """
    return simulate_run(replay_run(run, model), load_timings(run.config.timings))


def replay_run(run: Run, model: PreTrainedModel, visits: Iterator[Visit] | None = None) -> EngineRun:
    """Replay one run on the real clock. The configuration's timing trace cuts the engine's passes. The engine polls
    while idle, as in a calibration.

    visits: of a calibration (`qllm.executor.calibration.calibrate.calibration`), spread evenly over the time in which
    requests arrive, while the run's clock stands still: it measures the machine that the run sees, on the same thread.
    What is left of them after the run is the caller's."""
    config = run.config
    trace = request_trace(config, run.seed)
    limits = real_limits(config, model)
    asked = Asked(load_timings(config.timings), max_step=config.max_step, expert_mode=config.expert_mode)
    asked.calls = []
    policy = config.policies[run.policy].build()
    clock = PausingClock(asked, polls=True)
    with Engine(model, policy=policy, limits=limits, clock=clock, seed=run.seed) as engine:
        replay(engine, trace.head(min(WARM_UP, len(trace))), priorities=config.priorities, seed=run.seed)
        asked.calls.clear()
        visited: list[Visited] = []
        with calibrated_in(engine, clock, visits, trace, visited):
            real = replay(engine, trace, priorities=config.priorities, seed=run.seed)
        calls = list(asked.calls)
    return EngineRun(run, trace, limits, real, calls, visited)


def calibrated_in(
    engine: Engine, clock: PausingClock, visits: Iterator[Visit] | None, trace: RequestTrace, visited: list[Visited]
) -> AbstractContextManager[None]:
    """While this is open, visits run aside, evenly over the time in which requests of `trace` arrive, a few at once;
    `visited` gets them.

    A pass takes a tenth longer right after the machine stood idle, and one that goes on after a visit finds the
    processor's cache used by others.
    """
    if visits is None:
        return nullcontext()
    first = next(visits)
    left = first.planned - first.done  # what follows the last one is no visit
    begun = clock.now()  # the replay begins within a few hundredths of a second

    def stretches() -> Iterator[None]:
        for number, visit in enumerate(islice(visits, left), start=1):
            visited.append(Visited(clock.now() - begun, visit.cell, visit.seconds))
            if number % AT_ONCE == 0 or number == left:
                yield

    return asides(engine, clock, stretches(), float(np.ptp(trace.arrival)) * AT_ONCE / max(AT_ONCE, left))


def simulate_run(replayed: EngineRun, timings: Timings, slowed: list[Slowed] | None = None) -> Comparison:
    """Simulate a run that was replayed, with routing like that which was seen there, at the times of `timings` and at
    those of the speed that the machine had. `timings` may be others than those that cut the engine's passes, such as a
    calibration at the time of the run: the simulator's are cut by them. slowed: how slow the machine was in the run
    against them, of `slowed_in`; its mean is in `simulated` too, and how it changed in `at_speed`."""
    run, trace, limits, real, *_ = replayed
    config, bound = run.config, limits.max_seqs

    def simulation(steps: PassCostModel, pace: Pace | None = None) -> RunResult:
        return simulate(
            trace,
            priorities=config.priorities,
            policy=config.policies[run.policy].build(),
            limits=limits,
            steps=steps,
            routing=ResampledRouting(real.routing or [], timings.top_k, steps.layers, run.seed),
            seed=run.seed,
            timeline=True,
            pace=pace,
        )

    average = PassCostModel(timings, max_step=config.max_step, expert_mode=config.expert_mode)
    steps = at_speed(average, mean_speed(slowed, bound)) if slowed else average
    calls = [call._replace(cost=cost_of_call(steps, call)) for call in replayed.calls]
    passes = pass_seconds(real, calls, steps)
    speed = speed_of(passes, steps, bound)
    pace = pace_of(slowed, average, bound) if slowed else None
    followed = simulation(average if pace else at_speed(steps, speed), pace)
    return Comparison(run, trace, real, simulation(steps), steps, calls, passes, speed, followed)


def real_limits(config: Config, model: PreTrainedModel) -> Limits:
    """The configuration's limits; KV blocks, where it gives none, from the memory that is free on this machine."""
    timings = load_timings(config.timings)
    if config.limits.kv_blocks is None:
        blocks = blocks_in(model, timings.kv_bytes_per_token, config.limits.block_size, None)
        config = config.model_copy(update={"limits": config.limits.model_copy(update={"kv_blocks": blocks})})
    return scheduler_limits(config, timings)


def pass_seconds(real: RunResult, calls: list[Call], steps: PassCostModel) -> list[PassSeconds]:
    """Each real pass with the seconds that it took and those predicted for the same pass and routing, without what the
    engine's loop takes between two passes (a part of `host_s`)."""
    between_s = steps.timings.engine_between_s
    rested = after_rest(real)
    took: dict[int, float] = defaultdict(float)
    for s in real.slices or []:
        took[s.pass_id] += s.end - s.start
    found = []
    for (id, seconds), call, counts in zip(sorted(took.items()), calls, real.routing or [], strict=True):
        predicted = steps.total(call.cost, steps.experts_of_pass(call.cost, counts)) + steps.wake_s * (id in rested)
        found.append(PassSeconds(call, seconds, predicted - between_s, np.asarray(counts)))
    return found


def after_rest(real: RunResult) -> set[int]:
    """Ids of the passes before which nobody was in the system."""
    found, end = set(), 0.0
    for s in real.slices or []:
        if not ((real.arrival <= end) & (real.finish > s.start)).any():
            found.add(s.pass_id)
        end = s.end
    return found


def errors(requests: pd.DataFrame) -> pd.DataFrame:
    """Simulated against real, pooled over seeds: a row per policy, rate, class ("all" too), metric and statistic with
    real, simulated, at_speed, and the errors of both (simulated / real - 1; for preemptions the difference). Throughput
    is requests per second from the first arrival to the last token."""
    rows = []
    pooled = pd.concat([requests, requests.assign(**{"class": "all"})])
    for (policy, rate, cls), group in pooled.groupby(["policy", "rate", "class"], sort=False):
        worlds = dict(iter(group.groupby("world")))
        found: dict[tuple[str, str], list[float]] = {}
        for world in (REAL, SIMULATED, AT_SPEED):
            frame = worlds[world]
            for metric in METRICS:
                values = frame[metric].dropna().to_numpy()
                for name in STATISTICS:
                    found.setdefault((metric, name), []).append(statistic(values, name))
            spans = frame.groupby("seed").agg(first=("arrival_s", "min"), last=("finish_s", "max"))
            rate_done = frame["finish_s"].notna().sum() / (spans["last"] - spans["first"]).sum()
            found.setdefault(("throughput_rps", "mean"), []).append(float(rate_done))
            found.setdefault(("preemptions", "sum"), []).append(float(frame["preemptions"].sum()))
        for (metric, statistic_name), (real, *predicted) in found.items():
            errors_of = [p - real if metric == "preemptions" else p / real - 1 for p in predicted]
            rows.append([policy, rate, cls, metric, statistic_name, real, *predicted, *errors_of])
    columns = ["policy", "rate", "class", "metric", "statistic", REAL, SIMULATED, AT_SPEED, "error", "error_at_speed"]
    return pd.DataFrame(rows, columns=columns)


def statistic(values: np.ndarray, name: str) -> float:
    """The mean, or a percentile such as "p99"; nan of nothing."""
    if not len(values):
        return float("nan")
    return float(values.mean() if name == "mean" else np.quantile(values, int(name[1:]) / 100))
