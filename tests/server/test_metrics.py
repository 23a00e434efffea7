"""What Prometheus reads, and a dashboard that asks for nothing else."""

import dataclasses
import json
import re
from math import nan
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qllm.executor import Completion, RequestTimes, Stats
from qllm.executor.engine.recorder import Activity, PassPlace, Standing
from qllm.server.errors import ApiError
from qllm.server.metrics import BUCKETS, OUTCOMES, Metrics

ROOT = Path(__file__).parents[2]
STATS = Stats(3, 1, 9, 1, 64, 4096, 25, 100, 0)
ACTIVITY = Activity(
    now=5.0,
    classes={"ls": Standing(running=2, blocks=64), "be": Standing(waiting=1, suspended=3, blocks=11)},
    passes=[PassPlace(7, "be", 1, 0, 64, 2, "experts", True, 1.0, 4096)],
    slices=[],
    preemptions={("be", "experts"): 4, ("be", "layer"): 1},
    blocking_s={"ls": 0.25},
)


def completion(reason="stop", first_launch=2.0, suspended=0.5):
    times = RequestTimes(1.0, first_launch, 3.0, 5.0, 1.0, 2.5, suspended, 2, 0)
    other = {field.name: None for field in dataclasses.fields(Completion)}
    return Completion(**{**other, "finish_reason": reason, "times": times})


@pytest.fixture
def metrics():
    return Metrics(["ls", "be"], lambda: ACTIVITY)


def read(metrics: Metrics) -> dict:
    """(name without prefix, labels...) -> value."""
    families = text_string_to_metric_families(metrics.scrape(STATS).decode())
    return {
        (s.name.removeprefix("qllm:"), *s.labels.values()): s.value
        for f in families
        for s in f.samples
        if not s.name.endswith("_created")
    }


def test_a_request_is_counted_token_by_token_and_at_its_end(metrics):
    watch = metrics.began("be", 40)
    for _ in range(3):
        watch.token()
    found = read(metrics)
    assert found["prompt_tokens_total", "be"] == 40
    assert found["generation_tokens_total", "be"] == 3
    assert found["time_to_first_token_seconds_count", "be"] == 1
    assert found["inter_token_latency_seconds_count", "be"] == 2
    watch.ended(completion())
    found = read(metrics)
    assert found["e2e_request_latency_seconds_sum", "be"] == 4
    assert found["request_queue_time_seconds_sum", "be"] == 1
    assert found["suspended_seconds_sum", "be"] == 0.5
    assert found["requests_total", "be", "stop"] == 1
    assert found["requests_total", "ls", "stop"] == 0
    ((_, class_, seconds),) = metrics.ttfts
    assert class_ == "be"
    assert 0 <= seconds < 1


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        ("stop", "stop"),
        (completion("length"), "length"),
        (completion("deadline"), "deadline"),
        (completion("cancelled", first_launch=nan), "cancelled"),
        (ApiError(499, "gone"), "cancelled"),
        (ApiError(503, "ends"), "error"),
        (ValueError("broken"), "error"),
    ],
)
def test_each_end_has_its_outcome(metrics, ended, outcome):
    watch = metrics.began("ls", 7)
    for _ in range(3):
        watch.token()
    watch.ended(ended)
    found = read(metrics)
    for name, count in (("prompt_tokens", 7), ("generation_tokens", 3)):
        by_outcome = {one: found[f"{name}_by_outcome_total", "ls", one] for one in OUTCOMES}
        assert by_outcome == dict.fromkeys(OUTCOMES, 0) | {outcome: count}
    assert [name for name in OUTCOMES if found["requests_total", "ls", name]] == [outcome]
    assert found["e2e_request_latency_seconds_sum", "ls"] >= 0  # no nan among them


def test_what_the_engine_knows_is_told_by_class_and_point(metrics):
    metrics.rejected("queue_full", "be")
    found = read(metrics)
    assert found["num_requests_running", "ls"] == 2
    assert found["num_requests_waiting", "be"] == 1
    assert found["num_requests_suspended", "be"] == 3
    assert found["num_requests_suspended", "ls"] == 0
    assert found["preemptions_total", "be", "experts"] == 4
    assert found["preemptions_total", "ls", "experts"] == 0
    assert found["blocking_seconds_total", "ls"] == 0.25
    assert found["kv_cache_usage_perc", "ls"] == 0.64
    assert found["kv_cache_usage_perc", "be"] == 0.11
    assert (found["suspended_bytes", "ls"], found["suspended_bytes", "be"]) == (0, 4096)
    assert found["rejections_total", "be", "queue_full"] == 1


def test_each_metric_has_the_class_as_a_label(metrics):
    metrics.rejected("queue_full", "be")
    families = text_string_to_metric_families(metrics.scrape(STATS).decode())
    assert [sample.name for family in families for sample in family.samples if "class" not in sample.labels] == []


def test_buckets_rise_and_tell_milliseconds_apart():
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert BUCKETS[0] == 0.0005
    assert sum(bucket <= 0.01 for bucket in BUCKETS) >= 5


def test_two_servers_of_a_process_count_apart(metrics):
    other = Metrics(["ls"], lambda: ACTIVITY)
    metrics.began("ls", 7)
    assert read(other)["prompt_tokens_total", "ls"] == 0


def test_the_dashboard_asks_only_for_metrics_and_labels_that_exist(metrics):
    metrics.rejected("queue_full", "be")
    families = list(text_string_to_metric_families(metrics.scrape(STATS).decode()))
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    board = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name: expr for expr in asked for name in re.findall(r"qllm:\w+", expr)}
    assert set(named) <= set(labels)
    for name, expr in named.items():
        for group in re.findall(r"by \(([^)]*)\)", expr):
            assert set(group.split(", ")) <= labels[name], expr
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
    existing = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in labels} - {""}
    assert {name for name in existing if name + "_total" not in existing} == shown  # each stands in a panel
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
