"""OpenTelemetry: a span for each request of the engine, where a setting asks for it and the extra `otel` is installed.

Where spans go says the environment, as for every program that sends them: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME and so on. They hold times and numbers of tokens, and no text.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qllm.config.yaml_lines import ConfigError
from qllm.executor import Completion, Stats
from qllm.server.errors import GONE, ApiError
from qllm.server.streaming import Meter, Watch

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class Spans:
    """A meter that makes spans beside what another one counts.

    Args:
        meter: counts.
        tracer: makes the spans.
        model: its name.
    """

    def __init__(self, meter: Meter, tracer: Tracer, model: str):
        self._meter = meter
        self._tracer = tracer
        self._model = model

    def began(self, class_: str, prompt_tokens: int) -> Watch:
        """Begin a request's span."""
        told: dict[str, Any] = {"gen_ai.request.model": self._model, "qllm.class": class_}
        told["gen_ai.usage.input_tokens"] = prompt_tokens
        span = self._tracer.start_span("qllm.request", attributes=told)
        return _SpanWatch(self._meter.began(class_, prompt_tokens), span)

    def rejected(self, reason: str, class_: str = "") -> None:
        """Only counted."""
        self._meter.rejected(reason, class_)

    def scrape(self, stats: Stats) -> bytes:
        """What the other meter counted."""
        return self._meter.scrape(stats)


class _SpanWatch:
    def __init__(self, watch: Watch, span: Span):
        self._watch = watch
        self._span = span
        self._tokens = 0
        self._began = time.time()

    def token(self) -> None:
        self._watch.token()
        if self._tokens == 0:
            self._span.add_event("first token")
        self._tokens += 1

    def ended(self, outcome: Completion | Exception | str) -> None:
        self._watch.ended(outcome)
        span = self._span
        span.set_attribute("gen_ai.usage.output_tokens", self._tokens)
        reason = outcome if isinstance(outcome, str) else "error"
        if isinstance(outcome, Completion):
            reason = outcome.finish_reason
            self._tell_times(outcome)
        elif isinstance(outcome, ApiError) and outcome.status == GONE:
            reason = "cancelled"
        elif isinstance(outcome, Exception):
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, type(outcome).__name__))  # a message may hold anything
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        span.end()

    def _tell_times(self, completion: Completion) -> None:
        """Events where the request queued, ran and was suspended, with the seconds of each."""
        times, span = completion.times, self._span
        epoch = self._began - times.arrival  # of the engine's clock, to within the time that a submission takes
        events = [("queue", times.arrival, times.queueing), ("running", times.first_launch, times.running)]
        for name, at, seconds in events:
            if not math.isnan(at):
                span.add_event(name, {"seconds": seconds}, timestamp=int((epoch + at) * 1e9))
        if times.preemptions:
            span.add_event("suspended", {"seconds": times.suspended, "times": times.preemptions})


def with_spans(meter: Meter, model: str) -> tuple[Meter, Callable[[], None]]:
    """A meter that makes spans too, and what sends the last of them.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        missing = [name for name in NEEDED if find_spec(name) is None]
    except ModuleNotFoundError:  # the folder above is missing
        missing = [*NEEDED]
    if missing:
        raise ConfigError(f"spans: {', '.join(missing)} is not installed; spans need: pip install 'qllm-moe[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = os.environ.get("OTEL_SERVICE_NAME", "qllm")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(meter, provider.get_tracer("qllm"), model), provider.shutdown
