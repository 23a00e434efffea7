"""What a configuration describes: the request trace, the step times, the scheduler's limits."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import lru_cache

import numpy as np

from qllm.config.config import Config
from qllm.config.schema import Replay
from qllm.config.yaml_lines import ConfigError
from qllm.scheduler import Limits
from qllm.sim import isolated_ttft
from qllm.traces.files import file_stamp
from qllm.traces.requests.generate import assign_classes, generate
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.recipe import Recipe
from qllm.traces.requests.trace import SINGLE_CLASS, RequestTrace, TraceWarning
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.popularity import load_popularity
from qllm.traces.step_times.timings import Timings


# Files are read once per process, not once per point of a sweep; a file that has changed is read again.
def load_timings(name: str) -> Timings:
    """The timing trace of that path or bundled name. Raises TimingError."""
    return _read_timings(name, file_stamp(name))


@lru_cache(maxsize=4)
def _read_timings(name: str, _: object) -> Timings:
    return Timings.load(name)


@lru_cache(maxsize=4)
def _read_popularity(name: str, experts: int, layers: int, _: object) -> np.ndarray:
    return load_popularity(name, experts, layers)


@lru_cache(maxsize=4)
def _read_trace(
    file: str, format: str | None, unit: str | None, skip_invalid: bool, _: object
) -> tuple[RequestTrace, list[str]]:
    """The trace, and what reading it warned of: each run says so, whichever of them read the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = read_requests(file, format, unit=unit, skip_invalid=skip_invalid)
    return trace, [str(one.message) for one in caught]


def request_trace(config: Config, seed: int) -> RequestTrace:
    """The requests of one run, by workload and seed alone: every policy sees the same. ConfigError, TraceError.

    A request of a recorded trace keeps the bounds that it has there; one without gets the deadline of its class.
    """
    trace = _requests(config, seed)
    wanted = {name: job.deadline for name, job in config.classes.items() if job.deadline is not None}
    for key in ("ttft", "tpot"):
        of_class = [getattr(wanted.get(name), key, None) or math.inf for name in trace.classes]
        if min(of_class) < math.inf:
            name = f"max_{key}_s"
            own, usual = getattr(trace, name), np.array(of_class)[trace.cls]
            trace = replace(trace, **{name: usual if own is None else np.where(np.isinf(own), usual, own)})
    return trace


def _requests(config: Config, seed: int) -> RequestTrace:
    if isinstance(config.arrival, Replay):
        return _replayed(config, config.arrival, seed)
    recipe = config.recipe()
    if config.rate is None:
        raise ConfigError("rate: this key is missing; give rate (requests per second) or sweep.rate")
    if config.requests is not None:
        return generate(recipe, rate=config.rate, requests=config.requests, seed=seed)
    return _until(recipe, config.rate, config.duration or 0.0, seed)


def _until(recipe: Recipe, rate: float, duration: float, seed: int) -> RequestTrace:
    """The requests that arrive within `duration` seconds (a longer trace begins with the shorter one)."""
    expected = rate * duration
    requests = math.ceil(expected + 6 * math.sqrt(expected)) + 16
    while True:
        trace = generate(recipe, rate=rate, requests=requests, seed=seed)
        if trace.arrival[-1] > duration:
            return _within(trace, duration)
        requests *= 2


def _within(trace: RequestTrace, duration: float) -> RequestTrace:
    requests = int((trace.arrival <= duration).sum())
    if not requests:
        raise ConfigError(f"duration: no request arrives within {duration:g} s; allowed: longer, or requests")
    return trace.head(requests)


def _replayed(config: Config, replay: Replay, seed: int) -> RequestTrace:
    """The recorded trace cut, stretched and given classes as the configuration says."""
    given = replay.file, replay.format, replay.unit, replay.skip_invalid
    trace, warned = _read_trace(*given, file_stamp(replay.file))
    for message in warned:
        warnings.warn(message, TraceWarning, stacklevel=2)
    if replay.spread:
        trace = trace.spread()
    if config.duration is not None:
        trace = _within(trace, config.duration)
    if config.requests is not None:
        trace = trace.head(config.requests)
    if config.rate is not None:
        trace = trace.at_rate(config.rate)
    shares = {name: job.share for name, job in config.classes.items()}
    if trace.classes == SINGLE_CLASS and set(shares) != set(SINGLE_CLASS):
        return assign_classes(trace, shares, seed=seed)
    unknown = [name for name in trace.classes if name not in shares]
    if unknown:
        raise ConfigError(f"classes: {replay.file} has the class {unknown[0]!r}; allowed: {', '.join(shares)}")
    if any(share is not None for share in shares.values()) and trace.classes != SINGLE_CLASS:
        raise ConfigError(f"classes: {replay.file} names each request's class; leave share out")
    return trace


def scheduler_limits(config: Config, timings: Timings) -> Limits:
    """The scheduler's limits; KV blocks, unless given, from GPU memory. ConfigError where the model does not fit."""
    given = config.limits
    blocks = given.kv_blocks
    if blocks is None:
        room = timings.memory_bytes * given.memory_fraction - timings.weights_bytes - given.activation_bytes
        blocks = int(room // (timings.kv_bytes_per_token * given.block_size))
        if blocks < 1:
            raise ConfigError(
                f"limits.memory_fraction: {timings.model} ({timings.weights_bytes / 1e9:.1f} GB) and "
                f"{given.activation_bytes / 1e9:.1f} GB of activations leave no room for KV in "
                f"{given.memory_fraction:g} of {timings.memory_bytes / 1e9:.1f} GB; allowed: more, or limits.kv_blocks"
            )
    return limits_with(config, blocks)


def limits_with(config: Config, blocks: int) -> Limits:
    """The configured limits with that many KV blocks."""
    given = config.limits
    return Limits(
        max_seqs=given.max_seqs,
        max_batched_tokens=given.max_batched_tokens,
        kv_blocks=blocks,
        block_size=given.block_size,
        urgent_blocks=min(int(blocks * given.urgent_share), blocks - 1),
        max_suspended_tokens=given.max_suspended_tokens,
        evict=given.evict,
    )


def popularity(config: Config) -> np.ndarray:
    """Share of the tokens that go to each expert, float64[layers, experts]. Raises PopularityError."""
    timings = load_timings(config.timings)
    return _read_popularity(config.popularity, timings.experts, timings.layers, file_stamp(config.popularity))


def cost_model(config: Config) -> PassCostModel:
    """Step times of the configured model, GPU and cuts. Raises TimingError, PopularityError, ConfigError."""
    return _cost_model(*_device_key(config))


def _device_key(config: Config) -> tuple[str, str, float, str | None, object]:
    """What the cost model of a configuration depends on."""
    stamps = file_stamp(config.timings), file_stamp(config.popularity)
    return config.timings, config.popularity, config.max_step, config.expert_mode, stamps


@lru_cache(maxsize=4)
def _cost_model(timings: str, table: str, max_step: float, expert_mode: str | None, _: object) -> PassCostModel:
    loaded = load_timings(timings)
    shares = _read_popularity(table, loaded.experts, loaded.layers, file_stamp(table))
    try:
        return PassCostModel(loaded, max_step=max_step, expert_mode=expert_mode, popularity=shares)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def isolated(config: Config, prompt_tokens: np.ndarray) -> np.ndarray:
    """TTFT of each prompt alone on the idle device, seconds, float64[n]."""
    known = _isolated_by_length(*_device_key(config), config.limits)
    new = np.array([n for n in np.unique(prompt_tokens).tolist() if n not in known], dtype=np.int64)
    if len(new):
        limits = scheduler_limits(config, load_timings(config.timings))
        alone = isolated_ttft(new, limits=limits, steps=cost_model(config), popularity=popularity(config))
        known.update(zip(new.tolist(), alone.tolist(), strict=True))
    return np.array([known[n] for n in prompt_tokens.tolist()])


@lru_cache(maxsize=4)
def _isolated_by_length(*_: object) -> dict[int, float]:
    """What is known for one device, to be filled: the runs of a sweep share most of their lengths."""
    return {}
