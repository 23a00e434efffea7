"""The page: what it asks for, what it is told, and that a browser draws it."""

import json
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from qllm.executor.engine.recorder import Activity
from qllm.server.monitor import TTFTS_S, Look, Monitor
from qllm.server.settings import ServerSettings
from tests.server.worlds import ask, complete, server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_page_fetches_nothing_from_elsewhere(engine):
    app = server(engine, api_keys=[{"key": "a secret of ours"}])
    page, script = ask(app, "/"), ask(app, "/page.js")
    assert (page.status_code, script.status_code) == (200, 200)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype", "")
    assert "http" not in script.text
    assert ask(app, "/status").status_code == 401
    assert ask(app, "/status", authorization="Bearer a secret of ours").status_code == 200


def test_what_the_page_is_told_agrees_with_what_ran(engine):
    app = server(engine)
    began = time.time()
    for service_tier in ("default", "flex", "flex"):
        assert complete(app, "Hello there", max_tokens=4, service_tier=service_tier).status_code == 200
    told = ask(app, "/status").json()
    assert (told["model"], told["passes"]) == ("tiny", [])
    assert [(one["name"], one["running"] + one["waiting"]) for one in told["classes"]] == [("ls", 0), ("be", 0)]
    assert [one["class"] for one in told["ttfts"]] == ["ls", "be", "be"]
    assert {one["class"] for one in told["slices"]} == {"ls", "be"}
    assert all(began - 0.1 <= one["start"] <= one["end"] <= told["time"] for one in told["slices"])
    assert all(one["to"] == told["layers"] for one in told["slices"] if not one["suspended"])
    time.sleep(0.25)
    later = ask(app, f"/status?after={told['time']}").json()
    assert (later["slices"], later["ttfts"]) == ([], [])
    assert ask(app, "/status?after=soon").status_code == 400


def test_metrics_count_what_was_served_and_what_was_refused(engine):
    app = server(engine)
    complete(app, "Hello there", max_tokens=5, service_tier="flex")
    complete(app, "Hello there", max_tokens=5, stream=True)
    complete(app, "Hello there", echo=True)
    families = text_string_to_metric_families(ask(app, "/metrics").text)
    found = {(s.name.removeprefix("qllm:"), *s.labels.values()): s.value for f in families for s in f.samples}
    for class_ in ("ls", "be"):
        assert found["generation_tokens_total", class_] == 5
        assert found["time_to_first_token_seconds_count", class_] == 1
        assert found["e2e_request_latency_seconds_count", class_] == 1
        assert found["requests_total", class_, "length"] == 1
        assert found["num_requests_running", class_] == 0
        assert found["kv_cache_usage_perc", class_] == 0
    assert found["rejections_total", "", "unsupported_parameter"] == 1


def test_a_priority_without_a_class_counts_in_the_next_more_urgent_one(engine):
    monitor = Monitor(engine, ServerSettings(), "tiny")
    assert [monitor.class_of(priority) for priority in (-5, 0, 1, 9)] == ["ls", "ls", "be", "be"]


def test_first_tokens_are_told_once_and_not_for_ever(engine):
    monitor = Monitor(engine, ServerSettings(), "tiny")
    now = time.time()
    monitor.metrics.ttfts.extend((now + at, "ls", 0.1) for at in (-TTFTS_S - 1, -2.0, -1.0, 1.0))
    look = Look(Activity(5.0, {}, [], [], {}, {}), 10, 10, now)
    assert [one["time"] - now for one in monitor._told(look, 0.0)["ttfts"]] == pytest.approx([-2, -1], abs=1e-3)
    assert [one["time"] - now for one in monitor._told(look, now - 1.5)["ttfts"]] == pytest.approx([-1], abs=1e-3)


def test_the_engine_is_asked_once_for_many_pages(engine, monkeypatch):
    monitor = Monitor(engine, ServerSettings(), "tiny")
    asked = []
    real = monitor.look
    monkeypatch.setattr(monitor, "look", lambda: asked.append(1) or real())
    for _ in range(20):
        monitor.status()
    assert len(asked) <= 2


@pytest.fixture
def url(engine):
    """Where the page is served, on a socket."""
    app = server(engine)
    one = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=one.run)
    thread.start()
    while not one.started:
        time.sleep(0.01)
    for service_tier in ("default", "flex"):
        complete(app, "Hello there", max_tokens=4, service_tier=service_tier)
    yield f"http://127.0.0.1:{one.servers[0].sockets[0].getsockname()[1]}/"
    one.should_exit = True
    thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_page_without_an_error(url, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert ">serving<" in done.stdout
    assert "policy Slack" in done.stdout
    for name in ("ls", "be"):
        assert f"</span>{name}</td>" in done.stdout
    assert json.dumps("2048 KV blocks")[1:-1] in done.stdout
