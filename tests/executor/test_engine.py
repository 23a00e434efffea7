"""The engine on the real clock: tokens, streams, threads, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import qllm.executor.engine.execution
from qllm.executor import Engine, RealClock
from qllm.executor.errors import EngineClosed, RequestError, RequestFailed, SamplingError
from qllm.executor.model.passes import tensors
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, RequestTooLarge
from tests.engine_worlds import LAYERS, make_model, prompts

NEW = 9


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


@pytest.fixture(scope="module")
def expected():
    """The tokens of transformers' own greedy generation, by prompt."""
    plain = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)

    def generate(prompt: list[int]) -> list[int]:
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        return out[0, len(prompt) :].tolist()

    return generate


@pytest.mark.parametrize("policy", ["fcfs", "priority", "chunked", "layer", "qllm", "hybrid"])
def test_tokens_are_those_of_generate_whatever_the_policy(model, expected, policy):
    with Engine(
        model, policy=policy, limits=Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=100, block_size=4)
    ) as engine:
        asked = prompts(10, seed=1)
        streams = [engine.submit(p, max_new_tokens=NEW, priority=i % 3, stop=()) for i, p in enumerate(asked)]
        assert [s.result().tokens for s in streams] == [expected(p) for p in asked]
        assert {s.finish_reason for s in streams} == {"length"}


def test_an_engine_that_polls_never_sleeps_and_hears_of_requests(model, expected, monkeypatch):
    idled: list[float | None] = []
    idle = RealClock.idle

    def watched(self, until):
        idled.append(idle(self, until))
        return idled[-1]

    monkeypatch.setattr(RealClock, "idle", watched)
    prompt = prompts(1, seed=5)[0]
    with Engine(model, clock=RealClock(polls=True), limits=Limits(kv_blocks=100)) as engine:
        for _ in range(2):
            assert engine.submit(prompt, max_new_tokens=NEW, stop=()).result().tokens == expected(prompt)
            turns = len(idled)
            late = time.monotonic() + 30
            while len(idled) < turns + 10 and time.monotonic() < late:
                time.sleep(0.001)
            assert len(idled) >= turns + 10  # it goes on by itself
    assert set(idled) == {0.0}


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_tokens_are_the_same_when_memory_is_short(model, expected, evict):
    limits = Limits(max_seqs=6, max_batched_tokens=64, kv_blocks=14, block_size=4, evict=evict)
    asked = prompts(12, seed=2)
    with Engine(model, policy="qllm", limits=limits) as engine:
        streams = [engine.submit(p, max_new_tokens=NEW, priority=i % 2, stop=()) for i, p in enumerate(asked)]
        results = [s.result() for s in streams]
        stats = engine.stats()
    assert [r.tokens for r in results] == [expected(p) for p in asked]
    assert sum(r.times.evictions for r in results) > 0
    assert (stats.free_blocks, stats.host_bytes) == (14, 0)


def test_many_threads_stream_and_cancel(model, expected):
    asked = prompts(16, seed=3)
    got: dict[int, list[int]] = {}
    with Engine(model, policy="qllm", limits=Limits(max_seqs=8, max_batched_tokens=64, kv_blocks=200)) as engine:

        def client(i: int) -> None:
            stream = engine.submit(asked[i], max_new_tokens=NEW, priority=i % 2, stop=())
            for token in stream:
                if i % 4 == 3 and len(stream.tokens) == 2:
                    stream.cancel()
                    stream.cancel()
                got.setdefault(i, []).append(token.id)
            assert stream.finish_reason in ("length", "cancelled")

        threads = [threading.Thread(target=client, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.stats().free_blocks == 200
    for i, prompt in enumerate(asked):
        wanted = expected(prompt)
        assert got[i] == (wanted if i % 4 != 3 else wanted[: len(got[i])])


def test_stop_tokens_and_min_tokens(model, expected):
    prompt = prompts(1, seed=4)[0]
    tokens = expected(prompt)
    with Engine(model, limits=Limits(kv_blocks=50)) as engine:
        stopped = engine.submit(prompt, max_new_tokens=NEW, stop=[tokens[3]]).result()
        first = tokens.index(tokens[3])
        assert (stopped.tokens, stopped.finish_reason) == (tokens[: first + 1], "stop")
        longer = engine.submit(prompt, max_new_tokens=NEW, stop=[tokens[3]], min_tokens=first + 2).result()
        assert len(longer.tokens) > first + 1


def test_sampled_tokens_depend_on_the_seed_alone(model):
    prompt, other = prompts(2, seed=5)
    outputs = []
    for neighbours in (0, 3):
        with Engine(model, limits=Limits(kv_blocks=60)) as engine:
            beside = [engine.submit(other, max_new_tokens=NEW, stop=()) for _ in range(neighbours)]
            stream = engine.submit(prompt, max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=11, stop=())
            outputs.append(stream.result().tokens)
            assert all(len(other.result().tokens) == NEW for other in beside)
    assert outputs[0] == outputs[1]


def test_the_record_adds_up(model):
    with Engine(model, limits=Limits(kv_blocks=50)) as engine:
        times = engine.submit([5, 6, 7], max_new_tokens=4, stop=()).result().times
    assert times.arrival <= times.first_launch <= times.first_token <= times.finish
    total = times.queueing + times.running + times.suspended
    assert total == pytest.approx(times.finish - times.arrival)


class Words:
    """A tokenizer of one word a token."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, *, skip_special_tokens):
        return "".join(f" {i}" for i in ids)


def test_text_in_text_out(model):
    with Engine(model, Words(), limits=Limits(kv_blocks=50)) as engine:
        stream = engine.submit("5 6 7", max_new_tokens=4, stop=())
        pieces = [token.text for token in stream]
        assert pieces == [f" {i}" for i in stream.tokens]
        assert stream.result().text == "".join(pieces)


def test_mistakes_are_named(model):
    with Engine(model, limits=Limits(kv_blocks=4, block_size=4)) as engine:
        with pytest.raises(RequestError, match="at least one token id"):
            engine.submit([])
        with pytest.raises(RequestError, match="from 0 to 95"):
            engine.submit([3, 96])
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.submit("hello")
        with pytest.raises(RequestError, match="max_new_tokens is 0"):
            engine.submit([3], max_new_tokens=0)
        with pytest.raises(RequestError, match="allowed: 256 together"):
            engine.submit([3] * 250, max_new_tokens=10)
        with pytest.raises(SamplingError, match="top_p"):
            engine.submit([3], top_p=0)
        with pytest.raises(RequestTooLarge, match="take 6 KV blocks"):
            engine.submit([3] * 20, max_new_tokens=4).result()
    with pytest.raises(EngineClosed):
        engine.submit([3])


def test_closing_ends_what_is_left(model):
    engine = Engine(model, limits=Limits(kv_blocks=500))
    streams = [engine.submit([3] * 50, max_new_tokens=200, stop=()) for _ in range(4)]
    next(streams[0])
    engine.close()
    engine.close()
    for stream in streams:
        with pytest.raises(EngineClosed, match="closed"):
            stream.result()


def test_an_exception_in_a_pass_ends_its_requests_alone(model, expected, monkeypatch):
    """Here in sampling; inside the model: test_preemption_points."""

    broken = threading.Event()
    sample = qllm.executor.engine.execution.sample

    def fragile(*args):
        if broken.is_set():
            broken.clear()
            raise torch.OutOfMemoryError("no memory left")
        return sample(*args)

    monkeypatch.setattr(qllm.executor.engine.execution, "sample", fragile)
    prompt = prompts(1, seed=6)[0]
    with Engine(model, limits=Limits(kv_blocks=50)) as engine:
        broken.set()
        with pytest.raises(RequestFailed, match="no memory left") as caught:
            engine.submit([3, 4], stop=()).result()
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert engine.submit(prompt, max_new_tokens=NEW, stop=()).result().tokens == expected(prompt)
        assert engine.stats().free_blocks == 50


def test_importing_the_executor_does_not_import_torch():
    code = "import sys; from qllm import executor; assert 'torch' not in sys.modules; assert 'Engine' in dir(executor)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP runtime is asked")
@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        ("from qllm.executor import Engine; Engine", {}, "2000"),
        ("import qllm.cli, torch", {}, "2000"),
        ("import qllm.executor, torch", {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_waiting_threads_sleep_soon_whichever_way_in(code, given, expected):
    """Else a busy neighbour on one core slows the engine down several times."""
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env = {**clean, "OMP_DISPLAY_ENV": "VERBOSE", **given}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" in done.stderr:  # else PyTorch computes with another runtime
        assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_the_calling_thread_gives_up_its_openmp_team():
    """Else its idle helpers count, and those of the engine's thread sleep between operations."""
    script = """
import os, threading, torch
from qllm.executor.cpu.openmp import release_team
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)
torch.ones(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
released = release_team()
after = len(os.listdir("/proc/self/task"))
assert not released or after < before, (before, after)
assert torch.ones(1 << 20).exp().sum() > 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_a_second_engine_on_the_cpu_is_warned_of_and_one_after_another_is_not(model):
    limits = Limits(max_seqs=2, max_batched_tokens=16, kv_blocks=10)
    with Engine(model, limits=limits), pytest.warns(RuntimeWarning, match="one engine a process"):
        Engine(model, limits=limits).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        Engine(model, limits=limits).close()


def test_held_bytes_count_what_the_hooks_keep_in_objects_of_their_own():
    class Holds:
        holds_activations = True

        def __init__(self):
            self.pair = (torch.zeros(3), torch.zeros(4))
            self.number = 5

    held = Holds()
    assert list(map(len, tensors((held, torch.zeros(2), "text")))) == [3, 4, 2]
