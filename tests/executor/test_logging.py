"""What the engine logs, and that no prompt is in it."""

from __future__ import annotations

import logging

import pytest

import qllm.executor.engine.execution
import qllm.executor.engine.loop
from qllm.executor import Engine
from qllm.executor.errors import RequestError, RequestFailed, SamplingError, UnsupportedModelError
from qllm.executor.model.loading import load_model, prepare_model
from qllm.executor.testing import tiny_config, tiny_model
from qllm.scheduler import Limits, RequestTooLarge
from tests.engine_worlds import make_model, serve
from tests.executor.test_preemption_points import crowd, tight

SECRET = [77, 66, 55, 44]


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


@pytest.fixture
def told(caplog):
    """(level, message) of everything that the executor logged."""
    caplog.set_level(logging.DEBUG, logger="qllm.executor")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_loading_and_closing(told):
    with Engine(prepare_model(tiny_model("qwen3_moe")), limits=Limits(kv_blocks=50, block_size=4)) as engine:
        engine.submit(SECRET, max_new_tokens=2, stop=()).result()
    assert told() == [
        ("INFO", "model loaded: qwen3_moe, float32, on cpu"),
        ("INFO", "engine started: qwen3_moe, float32, on cpu, 50 KV blocks of 4 tokens, policy Slack"),
        ("INFO", "engine closed after 2 passes; 0 requests were left"),
    ]


def test_a_model_that_is_refused(told, tmp_path):
    tiny_config("llama4_text").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as refused:
        load_model(tmp_path)
    assert told() == [("WARNING", f"model refused: {refused.value}")]


def test_requests_that_are_refused(model, told):
    with Engine(model, limits=Limits(kv_blocks=4, block_size=4)) as engine:
        with pytest.raises(RequestTooLarge):
            engine.submit(SECRET * 5, max_new_tokens=4).result()
        with pytest.raises(RequestError):
            engine.submit([*SECRET, -1])
        with pytest.raises(SamplingError):
            engine.submit(SECRET, top_p=2.0)
    refused = [message for level, message in told() if level == "WARNING"]
    assert sum(message.startswith("request 0 refused: ") for message in refused) == 1
    assert sum(message.startswith("request refused: ") for message in refused) == 2
    assert not any("77, 66" in message for message in refused)


@pytest.mark.parametrize(
    ("evict", "message"),
    [
        ("recompute", "evicted: its KV is dropped, to be computed again"),
        ("offload", "evicted: its KV is in host memory"),
    ],
)
def test_evictions(model, told, evict, message):
    served = serve(model, crowd(), limits=tight(evict))
    evicted = {sequence.request.id for sequence in served if sequence.request.evictions}
    assert evicted
    logged = {int(text.split()[1]) for level, text in told() if level == "INFO" and message in text}
    assert logged == evicted


def test_a_pass_that_breaks(model, told, monkeypatch):
    def broken(*_):
        raise MemoryError(f"with {SECRET} in hand")

    monkeypatch.setattr(qllm.executor.engine.execution, "sample", broken)
    with Engine(model, limits=Limits(kv_blocks=50)) as engine, pytest.raises(RequestFailed):
        engine.submit(SECRET, stop=()).result()
    assert [entry for entry in told() if entry[0] == "ERROR"] == [
        ("ERROR", "pass 0 failed, with requests [0]: MemoryError")
    ]


def test_an_engine_that_breaks(model, told, monkeypatch):
    def broken(*_):
        raise KeyError("of the test")

    monkeypatch.setattr(qllm.executor.engine.loop.Loop, "_turn", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    Engine(model, limits=Limits(kv_blocks=50)).close()
    assert ("ERROR", "engine broke: KeyError") in told()
