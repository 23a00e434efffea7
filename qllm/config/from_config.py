"""What a configuration describes: the step times, and the scheduler's limits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qllm.config.config import Config
from qllm.config.yaml_lines import ConfigError
from qllm.scheduler import Limits
from qllm.scheduler.memory import residents
from qllm.sim import isolated_ttft
from qllm.traces.files import file_stamp
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


def scheduler_limits(config: Config, timings: Timings) -> Limits:
    """The scheduler's limits; KV blocks, unless given, from GPU memory. ConfigError where the model does not fit."""
    given = config.limits
    blocks, resident = given.kv_blocks, given.max_resident
    if timings.sequence_bytes:
        resident = residents(given.max_seqs, given.max_resident)
    if blocks is None:
        room = timings.memory_bytes * given.memory_fraction - timings.weights_bytes - given.activation_bytes
        room -= (resident or 0) * timings.sequence_bytes
        blocks = int(room // (timings.kv_bytes_per_token * given.block_size))
        if blocks < 1:
            raise ConfigError(
                f"limits.memory_fraction: {timings.model} ({timings.weights_bytes / 1e9:.1f} GB) and "
                f"{given.activation_bytes / 1e9:.1f} GB of activations leave no room for KV in "
                f"{given.memory_fraction:g} of {timings.memory_bytes / 1e9:.1f} GB; allowed: more, or limits.kv_blocks"
            )
    return limits_with(config, blocks, resident)


def limits_with(config: Config, blocks: int, resident: int | None = None) -> Limits:
    """The configured limits with that many KV blocks, and requests that hold some at a time."""
    given = config.limits
    return Limits(
        max_seqs=given.max_seqs,
        max_batched_tokens=given.max_batched_tokens,
        kv_blocks=blocks,
        block_size=given.block_size,
        urgent_blocks=min(int(blocks * given.urgent_share), blocks - 1),
        max_suspended_tokens=given.max_suspended_tokens,
        evict=given.evict,
        max_resident=resident,
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
