"""Metrics for Prometheus: vLLM's names behind the prefix `qllm:`, each with the class of requests as a label.

The prefix is our own, since the label and a few meanings are: a panel made for vLLM needs the prefix changed, no more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qllm.executor import Completion, Stats
from qllm.executor.engine.recorder import Activity, Standing
from qllm.server.errors import GONE, ApiError
from qllm.server.streaming import Watch

PREFIX = "qllm:"
#: Seconds: 1, 2 and 5 of each power of ten, from half a millisecond.
BUCKETS = (0.0005, *(round(digit * 10.0**power, 6) for power in range(-3, 2) for digit in (1, 2, 5)), 100, 200, 500)
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival at the engine to its first token",
    "inter_token_latency_seconds": "From a token of a request to its next one",
    "e2e_request_latency_seconds": "From a request's arrival at the engine to its end",
    "request_queue_time_seconds": "From a request's arrival at the engine to its first pass",
    "suspended_seconds": "For how long passes were suspended that a request was in",
}
COUNTERS = {
    "prompt_tokens": "Tokens of the prompts of requests",
    "generation_tokens": "Tokens generated",
}
ENDED = {
    "requests": "Requests of the engine that ended",
    "prompt_tokens_by_outcome": "Tokens of the prompts of requests that ended",
    "generation_tokens_by_outcome": "Tokens that requests had generated when they ended",
}
GAUGES = {
    "running": "Requests in the pass that runs, or between two decode passes",
    "waiting": "Requests that wait for a prefill, or in host memory",
    "suspended": "Requests in suspended passes",
}
OUTCOMES = ("stop", "length", "cancelled", "deadline", "error")
POINTS = ("layer", "attention", "experts", "head")
KEPT_TTFTS = 8192


class Watched:
    """Counts one request; see `Watch`."""

    def __init__(self, metrics: Metrics, class_: str, prompt_tokens: int):
        self._metrics = metrics
        self._class = class_
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._last = time.perf_counter()

    def token(self) -> None:
        now = time.perf_counter()
        metrics, took = self._metrics, now - self._last
        first = self._tokens == 0
        name = "time_to_first_token_seconds" if first else "inter_token_latency_seconds"
        metrics.histograms[name].labels(self._class).observe(took)
        metrics.counters["generation_tokens"].labels(self._class).inc()
        self._tokens += 1
        if first:
            metrics.ttfts.append((time.time(), self._class, took))
        self._last = now

    def ended(self, outcome: Completion | Exception | str) -> None:
        metrics, class_ = self._metrics, self._class
        if isinstance(outcome, Completion):
            reason, times = outcome.finish_reason, outcome.times
            seconds = {
                "e2e_request_latency_seconds": times.finish - times.arrival,
                "request_queue_time_seconds": times.first_launch - times.arrival,
                "suspended_seconds": times.suspended,
            }
            for name, value in seconds.items():
                if value >= 0:  # nan: it never came to that
                    metrics.histograms[name].labels(class_).observe(value)
        elif isinstance(outcome, str):
            reason = outcome
        else:
            gone = isinstance(outcome, ApiError) and outcome.status == GONE
            reason = "cancelled" if gone else "error"
        counts = {"prompt_tokens_by_outcome": self._prompt_tokens, "generation_tokens_by_outcome": self._tokens}
        for name, count in {"requests": 1, **counts}.items():
            metrics.ended[name].labels(class_, reason).inc(count)


class Metrics:
    """Counts requests, and tells it in Prometheus's text format. Any thread may call it.

    Args:
        classes: names of the classes of requests.
        activity: what the engine does now; asked at each scrape, in the thread that scrapes. Raises EngineClosed.

    Attributes:
        ttfts: the last first tokens: when (seconds of the epoch), the class, and the seconds that they took.
    """

    def __init__(self, classes: Sequence[str], activity: Callable[[], Activity]):
        self._activity = activity
        self._lock = Lock()
        self.ttfts: deque[tuple[float, str, float]] = deque(maxlen=KEPT_TTFTS)
        self._registry = registry = CollectorRegistry()  # of its own: a process may hold several servers
        self.histograms = {
            name: Histogram(PREFIX + name, told, ["class"], buckets=BUCKETS, registry=registry)
            for name, told in HISTOGRAMS.items()
        }
        self.counters = {
            name: Counter(PREFIX + name, told, ["class"], registry=registry) for name, told in COUNTERS.items()
        }
        self.ended = {
            name: Counter(PREFIX + name, told, ["class", "outcome"], registry=registry) for name, told in ENDED.items()
        }
        refused = "HTTP requests that were refused, by the code of their error"
        self.rejections = Counter(f"{PREFIX}rejections", refused, ["class", "reason"], registry=registry)
        self._engine = _EngineCollector(classes)
        registry.register(self._engine)
        for name in classes:  # a series that begins at its first event has lost that event
            for metric in (*self.histograms.values(), *self.counters.values()):
                metric.labels(name)
            for ended in self.ended.values():
                for outcome in OUTCOMES:
                    ended.labels(name, outcome)

    def began(self, class_: str, prompt_tokens: int) -> Watch:
        """A request was given to the engine; what is returned follows it."""
        self.counters["prompt_tokens"].labels(class_).inc(prompt_tokens)
        return Watched(self, class_, prompt_tokens)

    def rejected(self, reason: str, class_: str = "") -> None:
        """An HTTP request was refused for that reason, one of few; `class_` is empty where it has none yet."""
        self.rejections.labels(class_, reason).inc()

    def scrape(self, stats: Stats) -> bytes:
        """All metrics as text. It waits for the engine. Raises EngineClosed."""
        activity = self._activity()
        with self._lock:
            self._engine.look(stats, activity)
            return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine knows itself."""

    def __init__(self, classes: Sequence[str]):
        self._classes = classes
        self._stats: Stats | None = None
        self._activity: Activity | None = None

    def look(self, stats: Stats, activity: Activity) -> None:
        self._stats, self._activity = stats, activity

    def collect(self) -> Iterable[Metric]:
        if self._stats is None or self._activity is None:
            return
        yield from _standing(self._classes, self._activity)
        yield from _held(self._classes, self._activity, self._stats.total_blocks)
        yield from _counted(self._classes, self._activity)


def _standing(classes: Sequence[str], activity: Activity) -> Iterator[Metric]:
    for field, told in GAUGES.items():
        family = GaugeMetricFamily(f"{PREFIX}num_requests_{field}", told, labels=["class"])
        for name in classes:
            family.add_metric([name], getattr(activity.classes.get(name, Standing()), field))
        yield family


def _held(classes: Sequence[str], activity: Activity, total_blocks: int) -> Iterator[Metric]:
    told = "Share of the KV blocks that requests hold; the sum over the classes is 1 where all are in use"
    usage = GaugeMetricFamily(f"{PREFIX}kv_cache_usage_perc", told, labels=["class"])
    told = "Bytes of activations that suspended passes hold"
    held = GaugeMetricFamily(f"{PREFIX}suspended_bytes", told, labels=["class"])
    for name in classes:
        usage.add_metric([name], activity.classes.get(name, Standing()).blocks / total_blocks)
        held.add_metric([name], sum(one.held_bytes for one in activity.passes if one.class_ == name))
    yield usage
    yield held


def _counted(classes: Sequence[str], activity: Activity) -> Iterator[Metric]:
    told = "Passes that were suspended, by the class of their prefills, else of their decodes, and where they stood"
    preemptions = CounterMetricFamily(f"{PREFIX}preemptions", told, labels=["class", "point"])
    told = "Seconds that requests waited, in no pass, while a less urgent pass ran"
    blocking = CounterMetricFamily(f"{PREFIX}blocking_seconds", told, labels=["class"])
    for name in classes:
        for point in POINTS:
            preemptions.add_metric([name, point], activity.preemptions.get((name, point), 0))
        blocking.add_metric([name], activity.blocking_s.get(name, 0.0))
    yield preemptions
    yield blocking
