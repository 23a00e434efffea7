"""A configuration on the real engine: the same requests, limits, policies and tables as in its simulation.

Its timings, routing and GPU memory are not used, but a timing trace of this very device and model splits the passes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from qllm.config.config import Config
from qllm.config.from_config import cost_model, limits_with, load_timings
from qllm.config.policies import describe_failure
from qllm.config.workload import check_for_engine, request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.executor import Engine, RealClock, replay
from qllm.executor.calibration.environment import device_name, versions
from qllm.executor.errors import RequestError
from qllm.executor.graphs.runner import Graphs
from qllm.executor.model.info import dtype_name, model_facts
from qllm.executor.model.loading import LoadedModel, checked_device, checked_dtype, load, prepare_model
from qllm.executor.testing import DEMO, demo_model
from qllm.experiment.engines import Engines
from qllm.experiment.progress import Update
from qllm.experiment.results import Results
from qllm.experiment.run import Run, request_table, runs, sweep_rows
from qllm.scheduler import Limits, RequestTooLarge, make_policy
from qllm.scheduler.memory import residents
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.results import RunResult

SAME = ("source", "device", "layers", "hidden", "experts", "top_k", "dtype")  # of a timing trace and a model
ISOLATED_LENGTHS = 6  # prompt lengths at which the TTFT of a lone request is measured
ISOLATED_REPEATS = 3
ISOLATED = (
    f"isolated TTFT: lone requests at {ISOLATED_LENGTHS} prompt lengths, median of {ISOLATED_REPEATS}, linear between"
)


def load_target(
    name: str | None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    experts: str = "plain",
) -> LoadedModel:
    """The model to run: a checkpoint (path or Hugging Face name), or the demo model (None; its dtype is float32).

    Raises LoadError (model, device or dtype is not there) and UnsupportedModelError.
    """
    if name is not None:
        return load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, experts=experts)
    place, chosen = checked_device(device), checked_dtype(dtype)
    model = demo_model(place, torch.float32 if chosen == "auto" else getattr(torch, chosen))
    return LoadedModel.of(DEMO, prepare_model(model, experts=experts), "random")


def describe(target: LoadedModel) -> str:
    """Device, model and dtype, as results name them."""
    return f"{device_name(target.model.device)}; {target.name}; {dtype_name(target.model)}"


def engine_clock(target: LoadedModel, config: Config) -> RealClock:
    """Real time, polling while idle; the timing trace splits passes if measured on this device and model."""
    timings = load_timings(config.timings)
    here = model_facts(target.model) | {"source": "measured", "device": device_name(target.model.device)}
    same = all(getattr(timings, key) == here[key] for key in SAME)
    return RealClock(cost_model(config) if same else None, polls=True)


def engine_limits(target: LoadedModel, config: Config) -> Limits:
    """The scheduler's limits; KV blocks, unless given, from the memory that the device has free."""
    given = config.limits
    blocks = given.kv_blocks
    if blocks is None:
        blocks = target.kv_blocks(given.block_size, residents(given.max_seqs, given.max_resident))
    return limits_with(config, blocks, given.max_resident)


def run(
    config: Config, target: LoadedModel, update: Update | None = None, graphs: Graphs = "load"
) -> tuple[Results, list[tuple[Run, RunResult]]]:
    """Run each point, policy and seed on the engine in turn; `update` is told how far it is. `graphs`: see Engine.

    Returns the results, and the runs at the last point with the first seed, for a timeline. Raises ConfigError,
    TraceError, SchedulerError, ExecutorError.
    """
    todo = runs(config)
    update = update or Update("")
    tables, shown = [], []
    alone: dict[Limits, tuple[np.ndarray, np.ndarray]] = {}
    last = config.points()[-1]
    with Engines(target, graphs=graphs, progress=recording(update)) as engines:
        for number, this in enumerate(todo, start=1):
            name = f"run {number} of {len(todo)}, {this}"
            check_for_engine(this.config)
            trace = request_trace(this.config, this.seed)
            limits = engine_limits(target, this.config)
            key = dataclasses.replace(limits, urgent_blocks=0, evict="recompute", max_suspended_tokens=None)
            lengths = _lengths(trace)
            if key not in alone or not np.isin(lengths, alone[key][0]).all():
                known = alone.get(key, (np.empty(0), np.empty(0)))
                update.phase(f"isolated TTFT, for {name}: lone requests", len(lengths) * ISOLATED_REPEATS)
                alone[key] = _joined(
                    known, lengths, isolated_ttft(this.config, target, limits, lengths, update, engines)
                )
            update.phase(f"{name}: requests", len(trace))
            result = replay_run(this, trace, target, limits, update, engines)
            tables.append(
                sweep_rows(this, request_table(this, trace, result, _between(trace.prompt_tokens, *alone[key])))
            )
            if this.point == last and this.seed == config.seed_list[0]:
                shown.append((this, result))
    requests = pd.concat(tables, ignore_index=True)
    return Results.of(requests, config.model_copy(update={"provenance": provenance(target)})), shown


def recording(update: Update) -> Callable[[int, int], None]:
    """Tells `update` how far an engine is with recording passes, as a phase of its own within the one that is told."""
    phase = update.doing, update.total

    def told(done: int, total: int) -> None:
        nonlocal phase
        if done == 0:
            phase = update.doing, update.total
            update.phase("recording passes", total)
        update(done, total)
        if done == total:
            update.phase(*phase)

    return told


def replay_run(
    this: Run, trace: RequestTrace, target: LoadedModel, limits: Limits, update: Update, engines: Engines
) -> RunResult:
    """One policy at one point. An exception of a user's policy becomes a ConfigError with file and line."""
    policy = this.config.policies[this.policy]
    priorities = this.config.priorities
    try:
        clock, max_step = engine_clock(target, this.config), this.config.max_step
        with engines.engine(policy.build(), limits, clock, max_step=max_step) as engine:
            warm_up(engine, trace)
            return replay(engine, trace, priorities=priorities, seed=this.seed, watch=update.watch)
    except Exception as error:
        if policy.file is None:
            raise
        raise ConfigError(f"{this}: {describe_failure(error.__cause__ or error, policy.file)}") from None


def warm_up(engine: Engine, trace: RequestTrace) -> None:
    """The first passes of an engine make its thread's workers: not part of what is measured."""
    for prompt in (int(trace.prompt_tokens.min()), int(trace.prompt_tokens.max())):
        _lone_ttft(engine, prompt, 2)


def isolated_ttft(
    config: Config, target: LoadedModel, limits: Limits, lengths: np.ndarray, update: Update, engines: Engines
) -> np.ndarray:
    """Seconds from submission to first token of a lone request at each prompt length, the median of a few, float64.

    NaN for a length that can never be served.
    """
    clock = engine_clock(target, config)
    with engines.engine(make_policy("fcfs"), limits, clock, max_step=config.max_step) as engine:
        for n in lengths[[0, -1]].tolist():
            _lone_ttft(engine, n, 2)
        found = np.empty((len(lengths), ISOLATED_REPEATS))
        for done, place in enumerate(np.ndindex(found.shape)):
            update(done, found.size)
            found[place] = _lone_ttft(engine, int(lengths[place[0]]), 1)
        return np.asarray(np.median(found, axis=1))


def _lone_ttft(engine: Engine, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds; NaN where such a request can never be served."""
    prompt = np.random.default_rng(prompt_tokens).integers(engine.vocabulary, size=prompt_tokens)
    try:
        times = engine.submit(prompt.tolist(), max_new_tokens=new_tokens, stop=()).result().times
    except (RequestError, RequestTooLarge):
        return math.nan
    return times.first_token - times.arrival


def _lengths(trace: RequestTrace) -> np.ndarray:
    """Prompt lengths of the trace, spread over its range: increasing, at most ISOLATED_LENGTHS."""
    spread = np.quantile(trace.prompt_tokens, np.linspace(0, 1, ISOLATED_LENGTHS), method="nearest")
    return np.unique(spread)


def _between(prompt_tokens: np.ndarray, lengths: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Linear between the lengths that could be served."""
    served = ~np.isnan(seconds)
    return np.interp(prompt_tokens, lengths[served], seconds[served]) if served.any() else prompt_tokens * math.nan


def _joined(known: tuple[np.ndarray, np.ndarray], at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = dict(zip(*(a.tolist() for a in known), strict=True)) | dict(zip(at.tolist(), values.tolist(), strict=True))
    lengths = np.array(sorted(both))
    return lengths, np.array([both[n] for n in lengths.tolist()])


def provenance(target: LoadedModel) -> dict[str, str]:
    """What the results depend on besides the configuration."""
    return {
        **versions(),
        "timings": f"engine: real; {describe(target)}",
        "isolated": ISOLATED,
        "date": time.strftime("%Y-%m-%d"),
    }


def caption(target: LoadedModel) -> str:
    """For figures and tables: nothing in them is simulated."""
    return f"Measured on {describe(target)}; {ISOLATED}"
