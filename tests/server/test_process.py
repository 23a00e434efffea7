"""A real process and real sockets: the openai client unmodified, signals, and the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from qllm.config.yaml_lines import ConfigError
from qllm.server.process.serve import is_loopback
from qllm.server.settings import ServerSettings, load_settings
from tests.server.worlds import WAIT_S, wait_for

ROOT = Path(__file__).parents[2]


class Process:
    """`qllm serve` on a free port, on the demo's model."""

    start_s = WAIT_S

    def __init__(self, folder: Path, *options: str, **settings):
        (folder / "server.yaml").write_text(yaml.safe_dump({"engine": {"kv_blocks": 4096}, **settings}))
        command = [
            sys.executable,
            "-m",
            "qllm",
            "serve",
            "--port",
            "0",
            "--config",
            str(folder / "server.yaml"),
            *options,
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        ended = self.process.poll
        try:
            wait_for(lambda: any("serving" in line for line in self.lines) or ended() is not None, self.start_s)
            found = re.search(r"serving demo at (http://\S+)/v1", "".join(self.lines))
            assert found, self.lines
        except AssertionError:
            self.kill()
            raise
        self.url = found[1]

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own processes too: they hold the same pipe
        self.process.wait()
        self._reader.join(WAIT_S)
        assert not self._reader.is_alive()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("served"))
    yield process
    process.kill()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as one:
        yield one


def test_the_openai_client_completes(client) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "demo:ls", "demo:be"]
    whole = client.completions.create(model="demo", prompt="Hello", max_tokens=8, temperature=0)
    parts = client.completions.create(model="demo", prompt="Hello", max_tokens=8, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.usage.completion_tokens == 8


def test_the_openai_client_chats(client) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked, service_tier="flex", logprobs=True, top_logprobs=3)
    assert whole.service_tier == "flex"
    assert len(whole.choices[0].logprobs.content) == 8
    *parts, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert last.usage.completion_tokens == 8


def test_the_openai_client_understands_refusals(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="Hello", echo=True)
    assert (caught.value.param, caught.value.code) == ("echo", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hello")


def test_a_client_that_closes_its_socket_frees_what_it_holds(served, client) -> None:
    body = {"prompt": "Hello", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=WAIT_S) as response:
            next(response.iter_lines())
    # Nothing of them is left where a request gets all places of the batch.
    asked = client.completions.create(model="demo", prompt="Hello", max_tokens=4, n=16, timeout=WAIT_S)
    assert len(asked.choices) == 16


def test_odd_bytes_on_a_socket_do_no_harm(served, client) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n"
    for data in (
        b"",
        b"\x00" * 100,
        b"GET\r\n\r\n",
        head,
        head + b"\r\n{",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
            connection.sendall(data)
    assert client.completions.create(model="demo", prompt="Hello", max_tokens=1).choices


def test_other_hosts_are_a_warning_without_keys() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.org")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("polcy: qllm", "did you mean 'policy'"),
        ("policy: quick", "quick"),
        ("drain_seconds: -1", "drain_seconds"),
        ("tiers: {flex: gold}", "no class is called 'gold'"),
        ("api_keys: [{key: short}]", "api_keys"),
        ("api_keys: [{key: secret-key, colour: red}]", "api_keys"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, text, told) -> None:
    (tmp_path / "server.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path / "server.yaml")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_settings_have_defaults() -> None:
    assert load_settings(None) == ServerSettings()
    assert ServerSettings().with_policy("qllm").policy.name == "qllm"
    with pytest.raises(ConfigError):
        ServerSettings().with_policy("quick")


def test_after_sigterm_an_open_stream_is_told_to_its_end(served) -> None:  # the last one: nobody serves after it
    body = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=WAIT_S) as response:
        lines = response.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        told = [line for line in lines if line]
    assert (len(told), told[-1]) == (101, "data: [DONE]")
    assert served.process.wait(WAIT_S) == 0
