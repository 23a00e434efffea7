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

    def __init__(self, metrics: Metrics, class_: str):
        self._metrics = metrics
        self._class = class_
        self._last = time.perf_counter()
        self._first = True

    def token(self) -> None:
        now = time.perf_counter()
        metrics, took = self._metrics, now - self._last
        name = "time_to_first_token_seconds" if self._first else "inter_token_latency_seconds"
        metrics.histograms[name].labels(self._class).observe(took)
        metrics.counters["generation_tokens"].labels(self._class).inc()
        if self._first:
            self._first = False
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
        metrics.requests.labels(class_, reason).inc()


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
        ended = "Requests of the engine that ended"
        self.requests = Counter(f"{PREFIX}requests", ended, ["class", "outcome"], registry=registry)
        refused = "HTTP requests that were refused, by the code of their error"
        self.rejections = Counter(f"{PREFIX}rejections", refused, ["class", "reason"], registry=registry)
        self._engine = _EngineCollector(classes)
        registry.register(self._engine)
        for name in classes:  # a series that begins at its first event has lost that event
            for metric in (*self.histograms.values(), *self.counters.values()):
                metric.labels(name)
            for outcome in OUTCOMES:
                self.requests.labels(name, outcome)

    def began(self, class_: str, prompt_tokens: int) -> Watch:
        """A request was given to the engine; what is returned follows it."""
        self.counters["prompt_tokens"].labels(class_).inc(prompt_tokens)
        return Watched(self, class_)

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
        yield from _counted(self._classes, self._activity)
        stats = self._stats
        used = 1 - stats.free_blocks / stats.total_blocks
        yield GaugeMetricFamily(f"{PREFIX}kv_cache_usage_perc", "Share of the KV blocks in use, 1 for all", used)
        told = "Bytes of activations that suspended passes hold"
        yield GaugeMetricFamily(f"{PREFIX}suspended_bytes", told, stats.suspended_bytes)


def _standing(classes: Sequence[str], activity: Activity) -> Iterator[Metric]:
    for field, told in GAUGES.items():
        family = GaugeMetricFamily(f"{PREFIX}num_requests_{field}", told, labels=["class"])
        for name in classes:
            family.add_metric([name], getattr(activity.classes.get(name, Standing()), field))
        yield family


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
