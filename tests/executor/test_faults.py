"""What goes wrong ends what it concerns and nothing else, and every client hears of it."""

import itertools
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qllm.executor.engine.engine import Engine
from qllm.executor.engine.text import Detokenizer
from qllm.executor.errors import EngineClosed, RequestError, RequestFailed, SamplingError
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, Policy
from tests.engine_worlds import make_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:another engine of this process:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),  # the engine's thread says why
]
LIMITS = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=64)


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


def joined(thread: threading.Thread) -> bool:
    thread.join(30)
    return not thread.is_alive()


def test_a_stop_that_arrives_just_before_the_engine_would_sleep_ends_it(model):
    engine = Engine(model, limits=LIMITS)
    engine._loop.send(lambda: engine._loop.send(engine._loop.stop))
    assert joined(engine._thread)
    engine.close()


def test_closing_after_a_cancel_at_any_token_ends(model):
    for at in range(1, 6):
        engine = Engine(model, limits=LIMITS)
        stream = engine.submit([5, 6, 7], max_new_tokens=20)
        list(itertools.islice(stream, at))
        stream.cancel()
        closer = threading.Thread(target=engine.close)
        closer.start()
        assert joined(closer)


@pytest.mark.parametrize(
    "given",
    [
        {"priority": None},
        {"priority": "x"},
        {"priority": float("nan")},
        {"priority": 0.5},
        {"priority": True},
        {"max_new_tokens": float("nan")},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"max_new_tokens": None},
        {"max_new_tokens": "3"},
        {"min_tokens": 17},
        {"min_tokens": 1.0},
        {"stop": "###"},
        {"stop": ["###"]},
        {"stop": 7},
        {"stop": [1.0]},
        {"top_k": 1.5},
        {"top_k": None},
        {"top_p": "0.9"},
        {"temperature": None},
        {"temperature": "hot"},
        {"seed": 1.5},
        {"seed": True},
        {"prompt": [5.7, 6]},
        {"prompt": [True]},
        {"prompt": b"abc"},
        {"prompt": 7},
        {"prompt": None},
        {"prompt": []},
        {"prompt": torch.ones(2, 2, dtype=torch.long)},
        {"prompt": [10**6]},
    ],
    ids=str,
)
def test_every_argument_is_checked_at_the_door(served, given):
    settings = {"prompt": [5, 6, 7], **given}
    with pytest.raises((RequestError, SamplingError), match=next(iter(given)).replace("max_new_tokens", "tokens")):
        served.submit(**settings)
    assert len(served.submit([5, 6], max_new_tokens=2, stop=()).result().tokens) == 2


@pytest.fixture(scope="module")
def served(model):
    with Engine(model, limits=LIMITS) as engine:
        yield engine


def test_what_tokenizers_and_tensors_give_is_a_prompt(served):
    from transformers import BatchEncoding

    expected = served.submit([5, 6, 7], max_new_tokens=3).result().tokens
    for prompt in (
        (5, 6, 7),
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]]),
        BatchEncoding({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}),
        BatchEncoding({"input_ids": torch.tensor([[5, 6, 7]])}),
    ):
        assert served.submit(prompt, max_new_tokens=3).result().tokens == expected


@pytest.mark.parametrize("question", ["level", "order", "select", "preempts", "resume"])
def test_a_policy_that_breaks_ends_every_stream_and_is_named(model, question):
    class Broken(Policy):
        granularity = "expert"
        armed = False

    def breaks(self, *args):
        if self.armed:
            raise KeyError("oops")
        return getattr(Policy, question)(self, *args)

    setattr(Broken, question, breaks)
    policy = Broken()
    engine = Engine(model, policy=policy, limits=LIMITS)
    streams = [engine.submit([5, 6, 7], max_new_tokens=100)]
    next(streams[0])
    policy.armed = question != "resume"
    if question == "resume":  # asked once a pass is suspended
        policy.preempts = lambda s, running, now: not s.suspended_passes
        policy.armed = True
    with suppress(EngineClosed):  # it may have broken already
        streams.append(engine.submit([8, 9], max_new_tokens=3))
    for stream in streams:
        with pytest.raises(EngineClosed, match=rf"policy Broken: {question} raised KeyError: 'oops'.*test_faults.py"):
            stream.result()
    assert joined(engine._thread)
    engine.close()


@pytest.mark.parametrize(
    "part", ["waiting", "suspended_passes", "requests", "running", "ready", "memory", "kv", "limits"]
)
@pytest.mark.parametrize("junk", [None, [], 5])
def test_a_policy_that_replaces_a_part_of_the_scheduler_leaves_nobody_waiting(model, part, junk):
    class Vandal(Policy):
        granularity = "expert"
        armed = False

        def preempts(self, s, running, now):
            if self.armed:
                setattr(s, part, junk)
            return False

    policy = Vandal()
    engine = Engine(model, policy=policy, limits=LIMITS)
    streams = [engine.submit([5, 6, 7], max_new_tokens=8) for _ in range(3)]
    next(streams[0])
    policy.armed = True
    ended = []
    for _ in range(2):
        with suppress(EngineClosed):  # it may have broken already
            streams.append(engine.submit([8, 9], max_new_tokens=3))
    for stream in streams:
        thread = threading.Thread(target=lambda s=stream: ended.append(outcome(s)), daemon=True)
        thread.start()
        assert joined(thread)
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    assert joined(closer)
    assert len(ended) == len(streams)


def outcome(stream):
    try:
        return stream.result().finish_reason
    except (EngineClosed, RequestFailed) as error:
        return error


def test_an_order_that_does_not_compare_is_the_policys_fault(model):
    class Mixed(Policy):
        def order(self, r):
            return ("a",) if r.id % 2 else (1,)

    engine = Engine(model, policy=Mixed(), limits=Limits(max_seqs=1, max_batched_tokens=64, kv_blocks=64))
    first = engine.submit([5, 6, 7], max_new_tokens=50)
    streams = []
    with suppress(EngineClosed):
        for _ in range(3):
            streams.append(engine.submit([5, 6, 7], max_new_tokens=50))
    with pytest.raises(EngineClosed, match="order gave"):
        first.result()
    engine.close()


def test_a_row_that_cannot_be_sampled_ends_its_own_request(model):
    with Engine(model, policy="chunked", limits=LIMITS) as engine:
        other = engine.submit([5, 6, 7], max_new_tokens=12)
        bad = engine.submit([5, 6, 7], max_new_tokens=9, min_tokens=2, stop=range(engine.vocabulary), temperature=1.0)
        with pytest.raises(RequestFailed, match="no token to choose"):
            bad.result()
        assert len(other.result().tokens) == 12


@pytest.mark.parametrize("policy", ["fcfs", "qllm"])
def test_the_times_of_cancelled_and_failed_requests_add_up(model, policy):
    with Engine(model, policy=policy, limits=LIMITS) as engine:
        engine.submit([5, 6, 7], max_new_tokens=30).result()
        for at in range(1, 8):
            beside = engine.submit([5, 6, 7], max_new_tokens=10)
            stream = engine.submit([5, 6, 7], max_new_tokens=40)
            list(itertools.islice(stream, at))
            stream.cancel()
            times = stream.result().times
            beside.result()
            assert times.queueing + times.running + times.suspended == pytest.approx(times.finish - times.arrival)
            assert min(times.queueing, times.running, times.suspended, times.preemptions, times.evictions) >= 0


def test_leaving_the_program_without_closing_ends_well():
    script = """
from qllm.executor.engine.engine import Engine
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
engine = Engine(tiny_model("qwen3_moe"), limits=Limits(kv_blocks=64))
streams = [engine.submit([5, 6, 7], max_new_tokens=200) for _ in range(3)]
next(streams[0])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0


class Bytes:
    """A byte-level tokenizer."""

    def decode(self, ids, *, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["naïve 日本語 🙂 ok", "ends inside 🙂"])
def test_the_end_of_the_text_is_told_even_inside_a_character(text):
    ids = list(text.encode())
    for cut in range(1, len(ids) + 1):
        decoder = Detokenizer(Bytes())
        pieces = [decoder.add(token, i == cut - 1) for i, token in enumerate(ids[:cut])]
        assert "".join(pieces) == bytes(ids[:cut]).decode(errors="replace") == decoder.decode(ids[:cut])


def test_stray_bytes_do_not_cost_ever_more():
    decoder, longest = Detokenizer(Bytes()), 0
    real = decoder.decode

    def counted(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return real(ids)

    decoder.decode = counted
    for i in range(500):
        decoder.add(0x80, i == 499)
    assert longest < 30


def test_a_tiny_model_of_a_family_serves_after_all_this():
    with Engine(tiny_model("qwen3_moe"), limits=LIMITS) as engine:
        assert len(engine.submit([1, 2, 3], max_new_tokens=4, stop=()).result().tokens) == 4
