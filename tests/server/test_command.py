"""qllm serve, short of serving; and the description of the API."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from qllm.cli import app as command_line
from qllm.config.yaml_lines import ConfigError
from qllm.executor import Engine, Grammar
from qllm.executor.errors import GrammarError
from qllm.server.process import load, serve
from qllm.server.protocol import ChatRequest, CompletionRequest
from qllm.server.settings import ServerSettings
from tests.server.worlds import ask, server


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policy", "quick"], "quick"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--dtype", "int3"], "int3"),
        (["no-such-folder/model"], "no-such-folder/model"),
        (["--replicas", "2"], "--backend ray"),
    ],
)
def test_a_mistake_ends_before_anything_listens(options, told) -> None:
    result = CliRunner().invoke(command_line, ["serve", *options])
    assert result.exit_code == 1  # 2 where main() catches it
    assert told in str(result.exception)
    assert "\n" not in str(result.exception).strip()


def test_replicas_without_ray_are_told_what_they_need(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "qllm.server.replicas.ray_serve", raising=False)
    result = CliRunner().invoke(command_line, ["serve", "--replicas", "2", "--backend", "ray"])
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'qllm-moe[ray]'" in str(result.exception)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_host_that_others_reach_is_warned_of(engine: Engine, monkeypatch, host, warned) -> None:
    class Borrowed:
        def __enter__(self):
            return engine

        def __exit__(self, *_):
            pass

    seen = []
    monkeypatch.setattr(load, "load_engine", lambda *_, **__: (Borrowed(), "it"))
    monkeypatch.setattr(serve, "run", lambda app, settings, host, port, listening: seen.append((host, port)))
    monkeypatch.setattr("qllm.server.app.make_app", lambda _, settings: server(engine))
    result = CliRunner().invoke(command_line, ["serve", "--host", host, "--port", "9000"])
    assert result.exit_code == 0, result.exception
    assert seen == [(host, 9000)]
    assert ("warning" in result.output) == warned


def test_the_description_of_the_api_names_every_field(engine: Engine) -> None:
    told = ask(server(engine), "/openapi.json").json()
    for path, model in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        schema = told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(model.model_fields)


def test_the_tokenizer_is_read_for_grammars_before_anybody_is_served(engine: Engine, monkeypatch) -> None:
    compiled: list[Grammar] = []
    monkeypatch.setattr(load.Engine, "from_pretrained", lambda *_, **__: engine)
    monkeypatch.setattr(engine, "compile", compiled.append)
    given = {"device": "cpu", "dtype": "auto", "trust_remote_code": False, "graphs": "load"}
    assert load.load_engine("folder/one", ServerSettings(), **given) == (engine, "one")
    assert len(compiled) == 1

    def lacking(_: Grammar) -> None:
        raise GrammarError("llguidance is not installed")

    monkeypatch.setattr(engine, "compile", lacking)
    assert load.load_engine("one", ServerSettings(), **given) == (engine, "one")
