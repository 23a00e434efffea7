"""A span a request, with the events of its life, and no text."""

import gzip
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from qllm.config.yaml_lines import ConfigError
from qllm.server.errors import ApiError
from qllm.server.spans import Spans, with_spans
from qllm.server.streaming import NoMeter
from tests.server.test_metrics import completion

export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


@pytest.fixture
def recorded():
    """(a meter that makes spans, what gives those that ended)."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter = export.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield Spans(NoMeter(), provider.get_tracer("test"), "tiny"), exporter.get_finished_spans
    provider.shutdown()


def test_a_span_tells_when_a_request_queued_ran_and_was_suspended(recorded):
    meter, spans = recorded
    watch = meter.began("be", 40)
    watch.token()
    watch.token()
    watch.ended(completion("length"))
    (span,) = spans()
    assert dict(span.attributes) == {
        "gen_ai.request.model": "tiny",
        "qllm.class": "be",
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("length",),
    }
    events = {event.name: event for event in span.events}
    assert set(events) == {"first token", "queue", "running", "suspended"}
    assert {name: event.attributes.get("seconds") for name, event in events.items()} == {
        "first token": None, "queue": 1.0, "running": 2.5, "suspended": 0.5,
    }  # fmt: skip
    assert events["suspended"].attributes["times"] == 2
    assert events["running"].timestamp - events["queue"].timestamp == pytest.approx(1e9, abs=1e4)
    assert span.status.is_unset


@pytest.mark.parametrize(
    ("ended", "reason", "fails"),
    [("stop", "stop", False), (ApiError(499, "gone"), "cancelled", False), (ValueError("the prompt"), "error", True)],
)
def test_a_span_tells_how_a_request_ended_and_no_message(recorded, ended, reason, fails):
    meter, spans = recorded
    meter.began("ls", 1).ended(ended)
    (span,) = spans()
    assert span.attributes["gen_ai.response.finish_reasons"] == (reason,)
    assert span.status.is_ok != fails or span.status.is_unset != fails
    assert (span.status.description == "ValueError") == fails


@pytest.mark.parametrize("named", [None, "ours"])
def test_spans_go_where_the_environment_says(monkeypatch, named):
    """To a server that is made up: what a span holds reaches it in OTLP."""
    told = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    if named:
        monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        meter, end = with_spans(NoMeter(), "tiny")
        meter.began("ls", 3).ended("stop")
        end()
        server.shutdown()
        thread.join()
    assert [path for path, _ in told] == ["/v1/traces"]
    assert all(
        word in gzip.decompress(told[0][1]) if told[0][1][:2] == b"\x1f\x8b" else word in told[0][1]
        for word in (b"qllm.request", b"tiny", (named or "qllm").encode())
    )


def test_without_the_extra_the_setting_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ConfigError, match=r"qllm-moe\[otel\]"):
        with_spans(NoMeter(), "tiny")
