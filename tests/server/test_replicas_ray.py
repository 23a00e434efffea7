"""Two replicas behind Ray Serve, in processes of their own, and the openai client: as `qllm serve --replicas 2`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from qllm.config.yaml_lines import ConfigError
from tests.server.test_process import ROOT, Process
from tests.server.worlds import WAIT_S, wait_for

pytest.importorskip("ray")
pytest.importorskip("ray.serve")

LONG = {"model": "demo", "prompt": "Hello", "extra_body": {"ignore_eos": True}, "stream": True}
SHORT = {"model": "demo", "prompt": "Hello", "max_tokens": 4, "temperature": 0}


class Replicas(Process):
    """The same, with two engines, each in a process of Ray's."""

    start_s = 240.0

    def __init__(self, folder: Path):
        super().__init__(folder, "--replicas", "2", "--backend", "ray", batches={"folder": str(folder / "batches")})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    process = Replicas(tmp_path_factory.mktemp("replicas"))
    yield process
    if process.process.poll() is None:
        process.process.send_signal(signal.SIGTERM)  # it ends Ray's processes; they outlive a kill for a while
        with suppress(subprocess.TimeoutExpired):
            process.process.wait(WAIT_S)
    process.kill()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as one:
        yield one


def numbers(served: Process, name: str, class_: str) -> list[float]:
    """That metric of each replica."""
    text = httpx.get(f"{served.url}/metrics", timeout=WAIT_S).text
    found = re.findall(rf'^qllm:{name}{{class="{class_}",replica="(\d)"}} (\S+)$', text, re.MULTILINE)
    assert [replica for replica, _ in found] == ["0", "1"], text
    return [float(value) for _, value in found]


def replica_pids(served: Process) -> list[int]:
    """Processes of the replicas below the server's, in their order."""
    found = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cmdline", encoding="utf-8") as file:
                named = re.match(r"ray::ServeReplica:\S*:replica-(\d)", file.read())
            if named and served.process.pid in _parents(int(entry)):
                found[named[1]] = int(entry)
        except OSError:  # it ended meanwhile
            continue
    return [found[name] for name in sorted(found)]


def _parents(pid: int) -> list[int]:
    found = []
    while pid > 1:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            pid = int(file.read().rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found


def test_the_openai_client_completes(client) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "demo:ls", "demo:be"]
    whole = client.completions.create(**SHORT)
    parts = client.completions.create(**SHORT, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**SHORT, echo=True)
    assert caught.value.param == "echo"


def test_beside_a_long_be_request_ls_goes_to_the_other_replica_and_leaving_frees_it(served, client) -> None:
    stream = client.completions.create(**LONG | {"model": "demo:be"}, max_tokens=10_000)
    next(iter(stream))
    busy = numbers(served, "num_requests_running", "be")
    before = numbers(served, "prompt_tokens_total", "ls")
    for _ in range(3):
        client.completions.create(**SHORT)
    after = numbers(served, "prompt_tokens_total", "ls")
    assert sorted(busy) == [0, 1]
    assert after[busy.index(1)] == before[busy.index(1)]
    stream.close()
    wait_for(lambda: numbers(served, "num_requests_running", "be") == [0, 0])


def test_a_batch_is_answered(client) -> None:
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 2}}'
    file = client.files.create(file=("in.jsonl", line.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
    assert client.batches.retrieve(batch.id).request_counts.completed == 1


@pytest.mark.slow
def test_a_killed_replica_ends_its_requests_others_serve_on_and_ray_starts_it_again(served, client) -> None:
    streams = [client.completions.create(**LONG, max_tokens=n) for n in (10_000, 60)]
    for stream in streams:
        next(iter(stream))
    running = numbers(served, "num_requests_running", "ls")
    assert running == [1, 1]
    ends: dict[int, object] = {}

    def read(i: int) -> None:
        try:
            ends[i] = [part.choices[0].text for part in streams[i]]
        except openai.APIError as error:
            ends[i] = error

    threads = [threading.Thread(target=read, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    os.kill(replica_pids(served)[0], signal.SIGKILL)  # of equal ones the first stream took the first
    for thread in threads:
        thread.join(WAIT_S)
    assert "is lost" in str(ends[0])
    assert isinstance(ends[1], list)
    health = httpx.get(f"{served.url}/health", timeout=WAIT_S)
    assert (health.status_code, health.json()["replicas"]["1"]) == (200, "ok")
    assert client.completions.create(**SHORT).choices

    def both_serve() -> bool:
        return httpx.get(f"{served.url}/health", timeout=WAIT_S).json()["replicas"] == {"0": "ok", "1": "ok"}

    wait_for(both_serve, served.start_s)
    assert len(replica_pids(served)) == 2


def test_after_sigterm_an_open_stream_is_told_to_its_end(served, client) -> None:  # nobody serves after it
    stream = client.completions.create(**LONG, max_tokens=100)
    next(iter(stream))
    served.process.send_signal(signal.SIGTERM)
    assert len(list(stream)) == 100  # and the last one, which says why it ended
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        client.completions.create(**SHORT)
    assert served.process.wait(WAIT_S) == 0
    assert replica_pids(served) == []


def test_the_example_is_an_application_of_ray_serve() -> None:
    from qllm.server.replicas.ray_serve import application

    given = yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text())
    (one,) = given["applications"]
    assert one["import_path"] == f"{application.__module__}:{application.__name__}"
    assert application(one["args"])
    for args, told in (({"replica": 2}, "replica"), ({"settings": {"polcy": "qllm"}}, "polcy")):
        with pytest.raises(ConfigError, match=told):
            application(args)
