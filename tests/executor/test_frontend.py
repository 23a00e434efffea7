"""What clients ask of an engine: ids, deadlines, stop strings, batches, conversations, priorities, an end."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from qllm.executor import Engine, EngineBusy, ExecutorError, VirtualClock
from qllm.executor.errors import EngineClosed, RequestError, RequestFailed
from qllm.scheduler import Limits, RequestTooLarge
from tests.engine_worlds import ROOMY, make_model, prompts, serve, step_model

pytestmark = pytest.mark.filterwarnings("ignore:another engine of this process:RuntimeWarning")
NEW = 9
WORDS = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 96)}


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ ' w7 ' + m.content }}{% endfor %}"
TEMPLATE += "{% if loud %} w8{% endif %}{% if add_generation_prompt %} w9{% endif %}"


@pytest.fixture(scope="module")
def model(one_thread):
    return make_model()


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, tokenizer(TEMPLATE), policy="priority", limits=ROOMY, max_waiting=4, seed=0) as engine:
        yield engine


@contextmanager
def standing_still(engine):
    """The engine waits meanwhile, so that requests pile up."""
    go, stands = threading.Event(), threading.Event()

    def stand():
        stands.set()
        go.wait(60)

    engine._loop.send(stand)
    stands.wait(60)
    try:
        yield
    finally:
        go.set()


def nothing_is_left(engine) -> None:
    late = time.monotonic() + 30
    while (stats := engine.stats()).requests or engine._desk.requests:
        assert time.monotonic() < late
    assert stats.free_blocks == stats.total_blocks
    assert not engine._desk._waiting


# ---- ids


def test_a_request_has_an_id_that_no_other_has_meanwhile(engine):
    with standing_still(engine):
        stream = engine.submit([5, 6], request_id="mine")
        with pytest.raises(RequestError, match="request_id is 'mine'; allowed: one that no request in the system has"):
            engine.submit([5, 6], request_id="mine")
        number = str(engine.submit([5, 6]).id + 1)
        own = engine.submit([7], request_id=number)
        other = engine.submit([7])
        assert other.request_id not in ("mine", number)
    assert stream.result().request_id == "mine"
    assert (own.result().request_id, other.result().request_id) == (number, str(other.id))
    assert engine.submit([5, 6], request_id="mine").result().usage.prompt_tokens == 2


def test_errors_and_the_log_name_a_request_by_its_id(model, caplog):
    caplog.set_level("INFO")
    with Engine(model, limits=Limits(kv_blocks=4, block_size=4)) as engine:
        with pytest.raises(RequestTooLarge, match=r"^request long: 20 prompt and 4 output tokens take 6 KV blocks"):
            engine.submit([3] * 20, max_new_tokens=4, request_id="long").result()
        left = engine.submit([3], max_new_tokens=15, stop=(), request_id="left")
    with pytest.raises(EngineClosed, match=r"^request left: the engine was closed"):
        left.result()
    assert "request long refused: " in caplog.text


# ---- deadlines


def test_what_has_not_ended_by_its_deadline_ends_then(model):
    """On the virtual clock: within one step."""
    asked = prompts(8, seed=2)
    with Engine(model, limits=ROOMY, clock=VirtualClock(step_model()), seed=0) as engine:
        free = [engine.submit(p, max_new_tokens=NEW, stop=()).result() for p in asked]
        start = engine.clock.now()
        with standing_still(engine):
            streams = [
                engine.submit(p, max_new_tokens=NEW, stop=(), priority=i % 2, deadline=0.004 * (i + 1))
                for i, p in enumerate(asked)
            ]
        ended = [stream.result() for stream in streams]
        nothing_is_left(engine)
    reasons = [completion.finish_reason for completion in ended]
    assert set(reasons) == {"deadline", "length"}
    for i, (completion, alone) in enumerate(zip(ended, free, strict=True)):
        assert completion.tokens == alone.tokens[: len(completion.tokens)]
        late = completion.times.finish - (start + 0.004 * (i + 1))
        if completion.finish_reason == "deadline":
            assert 0 <= late < 0.002
            assert len(completion.tokens) < NEW
        else:
            assert late <= 0


def test_a_deadline_in_the_queue_is_kept_too(engine):
    first = engine.submit([5, 6], max_new_tokens=200, stop=())
    late = [engine.submit([7], max_new_tokens=200, stop=(), deadline=0.02) for _ in range(3)]
    assert {stream.result().finish_reason for stream in late} == {"deadline"}
    first.cancel()
    nothing_is_left(engine)


# ---- stop strings


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_ends_the_request_where_its_text_holds_it(engine, temperature):
    given = {"max_new_tokens": 20, "stop": (), "temperature": temperature, "seed": 5}
    free = engine.submit([5, 6, 7], **given).result()
    words = free.text.split()
    for stop in (words[4], words[3][-1] + " " + words[4][:2], words[0], "nothing of the kind"):
        stream = engine.submit([5, 6, 7], stop_strings=["??", stop], **given)
        told = "".join(token.text for token in stream)
        result = stream.result()
        assert told == result.text == free.text.split(stop)[0]
        assert result.tokens == free.tokens[: len(result.tokens)]
        found = stop in free.text
        assert result.finish_reason == ("stop" if found else "length")
        shorter = engine.tokenizer.decode(result.tokens[:-1])
        assert stop not in shorter
        if found:
            assert stop in engine.tokenizer.decode(result.tokens)
    nothing_is_left(engine)


def test_a_stop_string_within_min_tokens_does_not_count(engine):
    free = engine.submit([5, 6, 7], max_new_tokens=12, stop=()).result()
    word = free.text.split()[2]
    result = engine.submit([5, 6, 7], max_new_tokens=12, stop=(), min_tokens=3, stop_strings=word).result()
    assert len(result.tokens) > 3


def test_a_tokenizer_that_breaks_ends_its_own_request(engine, monkeypatch):
    other = engine.submit([5, 6], max_new_tokens=NEW, stop=())
    real = engine.tokenizer.decode

    def fragile(ids, **settings):
        if threading.current_thread() is engine._thread:
            raise KeyError("of the test")
        return real(ids, **settings)

    monkeypatch.setattr(engine.tokenizer, "decode", fragile)
    with pytest.raises(RequestFailed, match="its text: KeyError"):
        engine.submit([5, 6], max_new_tokens=NEW, stop_strings="x").result()
    assert len(other.result().tokens) == NEW
    nothing_is_left(engine)


# ---- a full queue, and the end


def test_a_full_queue_is_told_at_once_and_has_room_again(engine):
    with standing_still(engine):
        streams = [engine.submit([5], max_new_tokens=2, stop=()) for _ in range(4)]
        with pytest.raises(EngineBusy, match="4 requests wait; allowed: 4"):
            engine.submit([6])
        streams.pop().cancel()  # it leaves the queue with the engine's next step
        with pytest.raises(EngineBusy):
            engine.submit([6])
    assert all(len(stream.result().tokens) == 2 for stream in streams)
    assert engine.submit([6], max_new_tokens=2, stop=()).result(30)
    nothing_is_left(engine)


def test_requests_that_have_begun_do_not_count_as_waiting(engine):
    streams = [engine.submit([5 + i], max_new_tokens=100, stop=()) for i in range(4)]
    for stream in streams:
        next(stream)
    with standing_still(engine):
        more = [engine.submit([6], max_new_tokens=1) for _ in range(4)]
        with pytest.raises(EngineBusy):
            engine.submit([6])
    assert all(stream.result() for stream in more)
    for stream in streams:
        stream.cancel()
    nothing_is_left(engine)


def test_closing_waits_for_the_requests_in_the_system_alone(model):
    engine = Engine(model, limits=ROOMY)
    streams = [engine.submit(p, max_new_tokens=30, stop=()) for p in prompts(6, seed=3)]
    refused = []

    def late():
        while not refused:
            try:
                engine.submit([5], max_new_tokens=1).cancel()
            except EngineClosed as error:
                refused.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    engine.close(drain=60)
    thread.join(30)
    assert not engine._thread.is_alive()
    assert [len(stream.result(0).tokens) for stream in streams] == [30] * 6
    engine.close(drain=None)


def test_what_takes_longer_than_the_drain_ends_with_the_engine(model):
    engine = Engine(model, limits=ROOMY)
    short, long = (engine.submit([5, 6], max_new_tokens=n, stop=()) for n in (1, 250))
    next(short)
    start = time.monotonic()
    engine.close(drain=0.02)
    assert time.monotonic() - start < 30
    assert short.result().finish_reason == "length"
    with pytest.raises(EngineClosed, match="was closed"):
        long.result()


@pytest.mark.parametrize("drain", [-1, "1", True, float("nan")])
def test_a_drain_is_a_number_of_seconds(engine, drain):
    with pytest.raises(RequestError, match="drain is"):
        engine.close(drain=drain)


# ---- batches and conversations


def test_a_batch_gives_what_its_prompts_give_alone_whatever_the_queue_holds(engine):
    asked = prompts(11, seed=4)
    told = []
    got = engine.generate(asked, progress=lambda *at: told.append(at), max_new_tokens=NEW, stop=())
    assert [c.tokens for c in got] == [engine.submit(p, max_new_tokens=NEW, stop=()).result().tokens for p in asked]
    assert [total for _, total in told] == [11] * 11
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (11, 11)
    assert engine.generate([]) == []
    nothing_is_left(engine)


def test_where_one_of_a_batch_is_refused_the_others_are_cancelled(engine):
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.generate([[5] * 9, [6] * 9, []], max_new_tokens=200, stop=())
    for prompts_ in ("w5 w6", 5, {"prompt": [5]}):
        with pytest.raises(RequestError, match="prompts is"):
            engine.generate(prompts_)
    nothing_is_left(engine)


def test_a_batch_is_refused_where_others_fill_the_queue(engine):
    with standing_still(engine):
        streams = [engine.submit([5], max_new_tokens=1) for _ in range(4)]
        with pytest.raises(EngineBusy):
            engine.generate([[5]])
    assert all(stream.result() for stream in streams)


def test_a_conversation_is_what_the_chat_template_makes_of_it(engine):
    said = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    assert engine.chat_prompt(said) == [0, 7, 5, 7, 6, 9]
    assert engine.chat_prompt(said, loud=True, add_generation_prompt=False) == [0, 7, 5, 7, 6, 8]
    stream = engine.chat(said, max_new_tokens=4, stop=(), template_settings={"loud": True})
    assert stream.prompt == [0, 7, 5, 7, 6, 8, 9]
    assert stream.result().tokens == engine.submit(stream.prompt, max_new_tokens=4, stop=()).result().tokens


@pytest.mark.parametrize("said", ["w5", [], ["w5"], None, [{"role": "user", "content": 5}]])
def test_messages_that_do_not_fit_are_refused(engine, said):
    with pytest.raises(RequestError, match="messages"):
        engine.chat(said)


def test_without_a_template_there_is_no_conversation(model):
    said = [{"role": "user", "content": "w5"}]
    for words, message in ((tokenizer(), "has no chat template"), (None, "has no tokenizer")):
        with Engine(model, words, limits=ROOMY) as engine, pytest.raises(RequestError, match=message):
            engine.chat(said)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, {"temperature": 0.6, "repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 7.0}, {"temperature": 0.6}),
    ],
)
def test_the_defaults_are_those_of_the_checkpoint_and_chat_follows_them(model, monkeypatch, generation, expected):
    made = GenerationConfig()
    for name, value in generation.items():
        setattr(made, name, value)
    monkeypatch.setattr(model, "generation_config", made)
    with Engine(model, tokenizer(TEMPLATE), limits=ROOMY) as engine:
        assert engine.defaults == expected
        said, given = [{"role": "user", "content": "w5"}], {"max_new_tokens": 12, "seed": 3}
        wanted = engine.submit(engine.chat_prompt(said), **given, **expected).result()
        assert engine.chat(said, **given).result().tokens == wanted.tokens
        greedy = engine.submit(engine.chat_prompt(said), max_new_tokens=12).result()
        assert engine.chat(said, max_new_tokens=12, **dict.fromkeys(expected, 1) | {"temperature": 0}).result()
        assert expected or greedy.tokens == wanted.tokens


# ---- priorities


def test_a_request_that_became_urgent_overtakes_those_that_wait(model):
    limits = Limits(max_seqs=1, max_batched_tokens=64, kv_blocks=100, block_size=4)
    with Engine(model, policy="priority", limits=limits) as engine:
        with standing_still(engine):
            streams = [engine.submit([5 + i], max_new_tokens=3, stop=(), priority=1) for i in range(3)]
            assert engine.reprioritize(streams[2], 0)
            assert engine.reprioritize(streams[0].request_id, 5)
        first = [stream.result().times.first_launch for stream in streams]
        assert first[2] < first[1] < first[0]
        assert not engine.reprioritize(streams[0], 1)
        assert not engine.reprioritize("nobody", 1)
        with pytest.raises(RequestError, match="priority is 'high'"):
            engine.reprioritize(streams[0], "high")
    assert not engine.reprioritize(streams[0], 1)


def test_a_priority_with_which_it_could_never_fit_is_not_taken(model, caplog):
    limits = Limits(kv_blocks=10, block_size=4, urgent_blocks=6)
    with Engine(model, limits=limits) as engine:
        with standing_still(engine):
            stream = engine.submit([5] * 20, max_new_tokens=4, stop=(), request_id="big")
            assert engine.reprioritize(stream, 1)
        assert len(stream.result().tokens) == 4
    assert "request big keeps its priority: " in caplog.text


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from(["qllm", "hybrid", "chunked", "priority"]))
def test_tokens_are_the_same_whenever_priorities_change(model, seed, policy):
    rng = random.Random(seed)
    limits = Limits(max_seqs=3, max_batched_tokens=32, kv_blocks=24, block_size=4, evict="offload")
    asked = [(prompt, 6, i % 3, 0.0007 * i) for i, prompt in enumerate(prompts(6, seed % 1000, high=20))]
    wanted = [request.tokens for request in serve(model, asked, limits=ROOMY, policy="fcfs")]

    def hook(loop, p, execution):
        if loop.sequences and rng.random() < 0.2:
            loop.reprioritize(rng.choice(list(loop.sequences.values())), rng.randrange(3))

    assert [request.tokens for request in serve(model, asked, limits=limits, policy=policy, hook=hook)] == wanted


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_whenever_requests_end_early_their_blocks_are_free(model, seed):
    """`serve` looks for blocks and requests that are left."""
    rng = random.Random(seed)
    limits = Limits(max_seqs=3, max_batched_tokens=32, kv_blocks=24, block_size=4)
    asked = [(prompt, 8, i % 2, 0.0007 * i) for i, prompt in enumerate(prompts(6, seed % 1000, high=20))]
    wanted = [request.tokens for request in serve(model, asked, limits=ROOMY, policy="fcfs")]

    def hook(loop, p, execution):
        for number in list(loop.sequences):
            if rng.random() < 0.02:
                loop.deadlines.add(loop.clock.now(), number)

    served = serve(model, asked, limits=limits, hook=hook)
    for request, all_of_them in zip(served, wanted, strict=True):
        assert request.tokens == all_of_them[: len(request.tokens)]
        assert request.finish_reason == "deadline" or request.tokens == all_of_them


# ---- the door


@pytest.mark.parametrize(
    "given",
    [
        {"request_id": ""},
        {"request_id": 5},
        {"request_id": "two\nlines"},
        {"request_id": "x" * 257},
        {"deadline": 0},
        {"deadline": -1.0},
        {"deadline": "1"},
        {"deadline": True},
        {"deadline": float("nan")},
        {"deadline": float("inf")},
        {"stop_strings": [""]},
        {"stop_strings": 5},
        {"stop_strings": None},
        {"stop_strings": [5]},
        {"stop_strings": b"abc"},
        {"skip_special_tokens": 1},
        {"skip_special_tokens": None},
    ],
    ids=str,
)
def test_every_argument_is_checked_at_the_door(engine, given):
    with pytest.raises(RequestError, match=next(iter(given))):
        engine.submit([5, 6, 7], **given)
    assert len(engine.submit([5, 6], max_new_tokens=2, stop=()).result().tokens) == 2


def test_strings_need_a_tokenizer_to_stop_at(model):
    with Engine(model, limits=ROOMY) as engine, pytest.raises(RequestError, match="stop_strings are given, but"):
        engine.submit([5], stop_strings="x")


@pytest.mark.parametrize("max_waiting", [0, -1, 1.5, True, "3"])
def test_a_bound_of_the_queue_is_a_number_of_requests(model, max_waiting):
    with pytest.raises(ExecutorError, match="max_waiting is"):
        Engine(model, limits=ROOMY, max_waiting=max_waiting)


def test_bounds_and_the_tenant_reach_the_scheduler(engine, monkeypatch):
    seen, original = [], engine.scheduler.add

    def spy(r, now):
        seen.append((r.max_ttft_s, r.max_tpot_s, r.tenant, dict(r.tags)))
        original(r, now)

    monkeypatch.setattr(engine.scheduler, "add", spy)
    engine.submit([5], max_new_tokens=1, max_ttft=2, max_tpot=0.5, tenant="ann", tags={"lane": "a"}).result()
    engine.submit([5], max_new_tokens=1).result()
    assert seen == [(2.0, 0.5, "ann", {"lane": "a"}), (float("inf"), float("inf"), "", {})]
    for odd in ({"max_ttft": 0}, {"max_tpot": "x"}, {"tenant": 5}, {"tenant": "x" * 999}, {"tags": {"a": 1}}):
        with pytest.raises(RequestError, match=f"{next(iter(odd))} is"):
            engine.submit([5], **odd)
