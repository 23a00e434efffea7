"""The workload that a configuration describes: its requests, and which of them follow others."""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import replace
from functools import lru_cache

import numpy as np

from qllm.config.config import Config
from qllm.config.schema import Batch, Closed, Conversations, Replay
from qllm.config.yaml_lines import ConfigError
from qllm.traces.files import file_stamp
from qllm.traces.prefixes import growing, prefixes_in_words
from qllm.traces.requests.generate import assign_classes, generate
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.recipe import Recipe
from qllm.traces.requests.trace import SINGLE_CLASS, RequestTrace, TraceWarning
from qllm.traces.sessions import Sessions, closed_loop, turns


@lru_cache(maxsize=4)
def _read_trace(
    file: str, format: str | None, unit: str | None, skip_invalid: bool, sessions: bool, _: object
) -> tuple[RequestTrace, list[str]]:
    """The trace, and what reading it warned of: each run says so, whichever of them read the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = read_requests(file, format, unit=unit, skip_invalid=skip_invalid, sessions=sessions)
    return trace, [str(one.message) for one in caught]


def _recorded(replay: Replay) -> tuple[RequestTrace, list[str]]:
    given = replay.file, replay.format, replay.unit, replay.skip_invalid, replay.sessions
    return _read_trace(*given, file_stamp(replay.file))


def request_trace(config: Config, seed: int) -> RequestTrace:
    """The requests of one run, by workload and seed alone: every policy sees the same. ConfigError, TraceError.

    A request of a recorded trace keeps the bounds that it has there; one without gets the deadline of its class.
    """
    trace = _requests(config, seed)
    if config.limits.prefix_cache and trace.prefixes is None:
        raise ConfigError(
            "limits.prefix_cache: no request says what its prompt begins with; allowed: true for a trace with hash_ids "
            "(Mooncake, Qwen-Bailian, jsonl of our own), and for arrival: {process: conversations, ...}"
        )
    following = sessions(config, seed, len(trace))
    if following is not None:
        trace = replace(trace, sessions=following)
    wanted = {name: job.deadline for name, job in config.classes.items() if job.deadline is not None}
    for key in ("ttft", "tpot"):
        of_class = [getattr(wanted.get(name), key, None) or math.inf for name in trace.classes]
        if min(of_class) < math.inf:
            name = f"max_{key}_s"
            own, usual = getattr(trace, name), np.array(of_class)[trace.cls]
            trace = replace(trace, **{name: usual if own is None else np.where(np.isinf(own), usual, own)})
    return trace


def check_for_engine(config: Config) -> None:
    """Raise ConfigError for what is simulated only."""
    if config.limits.prefix_cache:
        raise ConfigError("limits.prefix_cache: is simulated only; allowed: false on the engine")
    if config.replicas > 1:
        raise ConfigError(
            f"replicas: {config.replicas} are simulated only; allowed: 1 on the engine, which has one GPU"
        )
    if isinstance(config.arrival, Closed | Conversations):
        raise ConfigError(f"arrival: {config.arrival.process} is simulated only; allowed: another process")
    if has_followers(config):
        raise ConfigError("arrival: requests that follow others are simulated only; allowed: a trace without follows")


def has_followers(config: Config) -> bool:
    """Whether some requests come when others have ended. TraceError where a trace cannot be read."""
    arrival = config.arrival
    if isinstance(arrival, Replay):
        return _recorded(arrival)[0].sessions is not None
    return isinstance(arrival, Closed | Conversations)


def sessions(config: Config, seed: int, requests: int) -> Sessions | None:
    """Which of the requests of a closed loop or of conversations follow others; None of other processes."""
    arrival = config.arrival
    if not isinstance(arrival, Closed | Conversations):
        return None
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(b"think"),)))
    think_s = rng.exponential(arrival.think_s, requests)
    return closed_loop(arrival.clients, think_s) if isinstance(arrival, Closed) else turns(arrival.turns, think_s)


def _requests(config: Config, seed: int) -> RequestTrace:
    arrival = config.arrival
    if isinstance(arrival, Replay):
        return _replayed(config, arrival, seed)
    if isinstance(arrival, Batch | Closed):
        trace = generate(config.recipe(), rate=1.0, requests=config.requests or 0, seed=seed)
        return replace(trace, arrival=np.zeros(len(trace)))
    if config.offered_rate is None:
        raise ConfigError("rate: this key is missing; give rate (requests per second) or sweep.rate")
    if isinstance(arrival, Conversations):
        return _conversations(config, arrival, config.offered_rate, seed)
    if config.has_class_rates:
        return _by_class(config, config.offered_rate, seed)
    return _some(config, config.recipe(), config.offered_rate, seed)


def _some(config: Config, recipe: Recipe, rate: float, seed: int) -> RequestTrace:
    """As many requests as are asked for, or all within the time that is."""
    if config.requests is not None:
        return generate(recipe, rate=rate, requests=config.requests, seed=seed)
    return _until(recipe, rate, config.duration or 0.0, seed)


def _by_class(config: Config, rate: float, seed: int) -> RequestTrace:
    """Classes that come each at a rate of its own, from streams of its own: one class's rate moves no other's requests.

    `rate` is that of all together.
    """
    scale = rate / sum(job.rate or 0.0 for job in config.classes.values())
    span = config.duration or (config.requests or 0) / rate
    while True:
        parts = []
        for name, job in config.classes.items():
            recipe = config.recipe(name)
            own = int(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),)).generate_state(1)[0])
            try:
                parts.append(_until(recipe, scale * (job.rate or 0.0), span, own))
            except ConfigError:  # of a rare class there may be none
                continue
        merged = _merged(parts, tuple(config.classes))
        if config.requests is None or len(merged) >= config.requests:
            break
        span *= 1.1
    if not len(merged):
        raise ConfigError(f"duration: no request arrives within {span:g} s; allowed: longer, or requests")
    return merged if config.requests is None else merged.head(config.requests)


def _merged(parts: list[RequestTrace], classes: tuple[str, ...]) -> RequestTrace:
    """Generated traces of one class each as one, by arrival."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])

    arrival = column("arrival", float)
    cls = np.repeat([classes.index(part.classes[0]) for part in parts], [len(part) for part in parts]).astype(int)
    order = np.argsort(arrival, kind="stable")
    prompt, output = column("prompt_tokens", int), column("output_tokens", int)
    return RequestTrace(arrival[order], prompt[order], output[order], cls[order], classes)


def _conversations(config: Config, arrival: Conversations, rate: float, seed: int) -> RequestTrace:
    """Conversations one after the other, `rate` requests per second in all; a turn's prompt repeats what was said."""
    many = arrival.turns
    if config.requests is not None:
        firsts = generate(config.recipe(), rate=rate / many, requests=-(-config.requests // many), seed=seed)
    else:
        firsts = _until(config.recipe(), rate / many, config.duration or 0.0, seed)
    of_class = {
        name: generate(config.recipe(name), rate=rate, requests=len(firsts) * many, seed=seed)
        for name in firsts.classes
    }
    prompts, outputs = (
        np.stack([getattr(of_class[name], column).reshape(-1, many) for name in firsts.classes])[
            firsts.cls, np.arange(len(firsts))
        ]
        for column in ("prompt_tokens", "output_tokens")
    )
    said = np.cumsum(prompts + outputs, axis=1) - outputs
    trace = RequestTrace(
        np.repeat(firsts.arrival, many),
        said.ravel(),
        outputs.ravel(),
        np.repeat(firsts.cls, many),
        firsts.classes,
        prefixes=growing((said + outputs).ravel(), np.repeat(np.arange(len(firsts)), many), config.limits.block_size),
    )
    return trace if config.requests is None else trace.head(config.requests)


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
    trace, warned = _recorded(replay)
    for message in warned:
        warnings.warn(message, TraceWarning, stacklevel=2)
    if "prefixes" in trace.source and not config.limits.prefix_cache:
        told = prefixes_in_words(trace.source["prefixes"])
        warnings.warn(f"{replay.file}: {told}. Each is computed whole without limits.prefix_cache", TraceWarning, 2)
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
