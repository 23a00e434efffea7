"""How long a sweep takes and how much memory, estimated before it begins: within a factor of about three.

The constants were measured on one core of a server (seconds) and with pandas 2 (bytes).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qllm.config.config import Config
from qllm.config.from_config import cost_model, load_timings, scheduler_limits
from qllm.config.schema import Replay
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.run import Run

MOST_S = 3600.0  #: what takes longer is asked for twice
CONTAINER_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SAMPLE = 2000  # requests from which the lengths of the others are taken
_REQUEST_S, _DECODE_S, _PREFILL_S, _ALONE_S = 4e-5, 1.5e-5, 3e-5, 5e-4  # of each request, pass, lone prefill
_CELL_S, _ALONE_CELL_S, _FIRST_CELL_S = 1e-7, 2.5e-8, 5e-5  # of a layer's expert: a prefill, a lone one, to begin with
_CELL_BYTES, _ROW_BYTES, _RUN_BYTES = 6000, 600, 700  # of a layer's expert; of a request in tables, while simulated


@dataclass(frozen=True)
class _Requests:
    """What one point sends: how many requests, over how many seconds, and the lengths of some of them."""

    count: float
    span_s: float
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray


def check_size(todo: Sequence[Run], rows_of: Sequence[Run], jobs: int) -> None:
    """Raise ConfigError if the simulations `todo`, of the sweep `rows_of`, take too long or too much memory."""
    workers = min(jobs, os.cpu_count() or 1, max(len(todo), 1))
    seconds, rows, most, largest = 0.0, 0.0, 0.0, ""
    at_points: dict[int, tuple[_Requests, float]] = {}
    fresh = {id(run) for run in todo}
    for run in rows_of:
        if id(run.config) not in at_points:
            cells = _cells(run.config)
            _check_memory(cells * _CELL_BYTES * workers, workers, f"timings: a model of {cells:.2g} experts in all")
            at_points[id(run.config)] = (_requests(run.config, run.seed), cells)
        sent, cells = at_points[id(run.config)]
        rows += sent.count
        if sent.count > most:
            most, largest = sent.count, f"{_count(sent.count)} requests of {run}"
        needed = rows * _ROW_BYTES + workers * most * _RUN_BYTES
        _check_memory(needed, workers, f"the largest is {largest}")
        if id(run) in fresh:
            seconds += _seconds(run, sent, cells)
            _check_seconds(seconds / workers, f"on {workers} processes", f"{len(rows_of)} simulations", largest)


def check_engine_size(todo: Sequence[Run]) -> None:
    """Raise ConfigError if the arrivals of the real runs `todo` take too long, or their tables too much memory."""
    seconds = rows = 0.0
    for run in todo:
        sent = _requests(run.config, run.seed)
        seconds, rows = seconds + sent.span_s, rows + sent.count
        largest = f"{_count(sent.count)} requests of {run}"
        _check_memory(rows * _ROW_BYTES + sent.count * _RUN_BYTES, 1, f"the largest is {largest}")
        _check_seconds(seconds, "for the arrivals alone", f"{len(todo)} runs", largest)


def _check_seconds(seconds: float, how: str, what: str, largest: str) -> None:
    if seconds > MOST_S:
        raise ConfigError(
            f"{what} take more than {seconds / 3600:,.3g} hours {how}, by estimate (such as {largest}); allowed: an "
            "hour, with fewer or shorter requests, a shorter duration, fewer seeds, policies or swept values; or "
            "--any-size (any_size=True)"
        )


def _check_memory(needed: float, workers: int, what: str) -> None:
    there = memory_bytes()
    if needed > there:
        raise ConfigError(
            f"this takes more than {needed / 1e9:,.3g} GB of memory with {workers} processes, by estimate, and the "
            f"machine has {there / 1e9:.3g} ({what}); allowed: fewer requests, a shorter duration, fewer seeds, "
            "policies or swept values; or --any-size (any_size=True)"
        )


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e15 else f"{number:.3g}"


def memory_bytes() -> float:
    """The memory of this machine, or of the container that this runs in."""
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for limit in CONTAINER_LIMITS:
        try:
            found.append(float(limit.read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(found)


def _cells(config: Config) -> float:
    timings = load_timings(config.timings)
    return float(timings.layers) * timings.experts


def _requests(config: Config, seed: int) -> _Requests:
    """What is sent; only a replayed trace is drawn whole."""
    if isinstance(config.arrival, Replay):
        trace = request_trace(config, seed)
        span = float(trace.arrival[-1]) if len(trace) else 0.0
        return _Requests(len(trace), span, trace.prompt_tokens, trace.output_tokens)
    rate = config.offered_rate or 1.0
    count = float(config.requests or rate * (config.duration or 0.0))
    few = config.model_copy(update={"requests": max(1, min(_SAMPLE, int(count))), "duration": None})
    trace = request_trace(few, seed)
    return _Requests(count, count / rate, trace.prompt_tokens, trace.output_tokens)


def run_seconds(run: Run) -> float:
    """Seconds that one core simulates `run`, by estimate."""
    return _seconds(run, _requests(run.config, run.seed), _cells(run.config))


def _seconds(run: Run, sent: _Requests, cells: float) -> float:
    config = run.config
    limits = scheduler_limits(config, load_timings(config.timings))
    capacity = float(limits.kv_blocks or np.inf) * limits.block_size
    fits = sent.prompt_tokens + sent.output_tokens - 1 <= capacity
    prompt, output = sent.prompt_tokens[fits].astype(float), sent.output_tokens[fits].astype(float)
    if not len(prompt):
        return sent.count * _REQUEST_S
    share = len(prompt) / len(fits) * sent.count
    chunk = min(limits.max_batched_tokens, getattr(config.policies[run.policy].build(), "budget", 1 << 62))
    prefills = share * float(np.ceil(prompt / chunk).mean())
    together = max(1.0, min(limits.max_seqs, capacity / (prompt + output).mean()))
    tokens = share * float(output.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the simulation says so itself
        alone_s = cost_model(config).decode_total(1, int(prompt.mean()), False)
    decodes = min(tokens, max(tokens / together, sent.span_s / alone_s))
    lengths = np.unique(prompt)
    alone = float(np.ceil(lengths / limits.max_batched_tokens).sum())
    if sent.count > len(fits):  # more of them have other lengths, up to the longest
        alone *= min(sent.count, float(np.ptp(prompt)) + 1) / min(len(fits), float(np.ptp(prompt)) + 1)
    return float(
        sent.count * _REQUEST_S
        + decodes * _DECODE_S
        + prefills * (_PREFILL_S + cells * _CELL_S)
        + alone * (_ALONE_S + cells * _ALONE_CELL_S)
        + cells * _FIRST_CELL_S
    )
