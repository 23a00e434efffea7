"""Structured output, penalties and logprobs in the engine: right for every request, whatever becomes of its passes."""

import builtins
import json
import re
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qllm.executor import Engine, Grammar, SamplingError
from qllm.executor.errors import GrammarError, RequestFailed
from qllm.executor.model.loading import prepare_model
from qllm.executor.sampling import grammar as grammar_module
from qllm.executor.sampling.device_sampling import sample_on_device
from qllm.executor.sampling.grammar import Grammars, Matcher
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import prepared
from qllm.executor.sampling.sampling import sample
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits
from tests.engine_worlds import LAYERS, WatchedClock, prompts, step_model

llguidance = pytest.importorskip("llguidance")
pytest.importorskip("llguidance.hf")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, END = 300, 1  # more than the tokenizer has, as in many checkpoints
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None},
}
LIMITS = Limits(max_seqs=8, max_batched_tokens=64, kv_blocks=200)


def byte_tokenizer():
    """A token for each byte, and some of several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": END} | {letter: i + 2 for i, letter in enumerate(letters)}
    merges = [('"', ":"), ("a", "g"), ("ag", "e"), ("t", "a"), ("}", "}")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(one_thread):
    return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=LAYERS, vocab_size=VOCABULARY, eos_token_id=END))


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    with Engine(model, tokenizer, limits=LIMITS, seed=0) as engine:
        yield engine


def fits(text):
    found = json.loads(text)
    return (
        [*found] == ["name", "age", "tags"]
        and len(found["name"]) <= 6
        and 0 <= found["age"] <= 150
        and len(found["tags"]) <= 3
        and {*found["tags"]} <= {"a", "bc"}
    )


def test_random_weights_write_json_by_the_schema_whatever_the_seed(engine):
    asked = {"max_new_tokens": 200, "grammar": Grammar.json_schema(SCHEMA)}
    streams = [engine.submit("x", seed=seed, temperature=1.5, **asked) for seed in range(40)]
    streams += [engine.submit("x", seed=seed, temperature=1.0, top_k=5, top_p=0.9, **asked) for seed in range(40)]
    found = [stream.result() for stream in (*streams, engine.submit("x", **asked))]
    assert {each.finish_reason for each in found} == {"stop"}
    assert all(fits(each.text) for each in found)
    assert len({each.text for each in found}) > 40


def test_a_regular_expression_matches_as_a_whole_and_ends_although_nothing_is_to_stop_it(engine):
    asked = {"max_new_tokens": 30, "grammar": Grammar.regex(r"[ab]{2,5}-[0-9]+x"), "temperature": 1.0, "stop": ()}
    found = [engine.submit("x", seed=seed, **asked).result() for seed in range(10)]
    assert all(re.fullmatch(r"[ab]{2,5}-[0-9]+x", each.text) for each in found if each.finish_reason == "stop")
    assert sum(each.finish_reason == "stop" for each in found) >= 5
    assert all(each.tokens[-1] == END for each in found if each.finish_reason == "stop")


def test_a_json_object_is_one(engine):
    found = [
        engine.submit("x", max_new_tokens=230, grammar=Grammar.json_object(), temperature=0.8, seed=seed).result()
        for seed in range(10)
    ]
    assert all(each.text.startswith("{") for each in found)
    assert all(isinstance(json.loads(each.text), dict) for each in found if each.finish_reason == "stop")


def test_no_end_before_min_tokens_unless_nothing_else_is_allowed(engine):
    longer = engine.submit("x", max_new_tokens=20, min_tokens=9, grammar=Grammar.regex("a*")).result()
    assert len(longer.tokens) > 9
    assert {*longer.tokens[:9]} == {*engine.tokenizer.encode("a")}
    forced = engine.submit("x", max_new_tokens=20, min_tokens=9, grammar=Grammar.regex("aaa")).result()
    assert (forced.text, forced.finish_reason) == ("aaa", "stop")


def test_a_device_keeps_to_a_grammar_as_a_cpu_does(tokenizer):
    grammars = Grammars(tokenizer, VOCABULARY)
    plain, bound = SamplingParams(1.0), SamplingParams(1.0, top_k=9, grammar=Grammar.regex("(ab|cd){9}"), logprobs=1)
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    said = []
    for how in (sample, sample_on_device):
        written = [[], [], []]
        params, states = zip(*(prepared(p, [5], grammars) for p in (bound, plain, bound)), strict=True)
        for step in range(12):
            for state, tokens in zip(states, written, strict=True):
                if state is not None:
                    state.follow([5, *tokens])
            for tokens, token in zip(written, how(logits, params, [step] * 3, range(3), states), strict=True):
                tokens.append(token)
        said.append(written)
        texts = [tokenizer.decode(written[row], skip_special_tokens=True) for row in (0, 2)]
        assert all(re.fullmatch("(ab|cd){6}", text) for text in texts)
        assert states[0].logprobs.chosen == pytest.approx(float(logits[0].log_softmax(-1)[written[0][-1]]), abs=1e-4)
    assert said[0] == said[1]


def asked_of(n, tokenizer):
    """Requests with all that is remembered from token to token: (prompt, parameters)."""
    schema = Grammar.json_schema(SCHEMA)
    kinds = [
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "logprobs": 3},
        {"presence_penalty": 1.5, "temperature": 0.9, "min_p": 0.02, "logit_bias": {7: 2.0}},
        {"grammar": schema, "temperature": 1.2, "frequency_penalty": 0.1, "logprobs": 0},
        {},
    ]
    ends = frozenset({END})
    return [
        (prompt, SamplingParams(stop=ends, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(prompts(n, seed=4))
    ]


def told(done):
    return done.tokens, done.finish_reason, done.logprobs and [each.chosen for each in done.logprobs]


@pytest.mark.filterwarnings("ignore:another engine of this process")
@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_suspended_and_evicted_requests_say_what_they_say_alone(model, tokenizer, evict):
    asked = asked_of(12, tokenizer)
    with Engine(model, tokenizer, limits=LIMITS, seed=0) as alone:
        right = []
        for prompt, params in asked:
            request = alone.make_request(prompt, 40, 0, params, alone.clock.now())
            alone._loop.send(lambda request=request: alone._loop.add(request))
            right.append(told(alone.stream_of(request).result()))
    limits = Limits(max_seqs=6, max_batched_tokens=64, kv_blocks=24, block_size=4, evict=evict)
    clock = WatchedClock(step_model(), lambda *_: None)
    with Engine(model, tokenizer, policy="qllm", limits=limits, clock=clock, seed=0) as engine:
        clock.loop = engine._loop
        served = [
            engine.make_request(p, 40, i % 2, params, (i % 2 == 0) * i * 9.1e-3) for i, (p, params) in enumerate(asked)
        ]
        engine.call(lambda loop: loop.scheduled.extend(served))
        found = [engine.stream_of(request).result() for request in served]
    assert [told(done)[:2] for done in found] == [each[:2] for each in right]
    assert all(its == pytest.approx(told(done)[2], abs=1e-4) for (*_, its), done in zip(right, found, strict=True))
    assert sum(done.times.preemptions for done in found) > 0
    assert sum(done.times.evictions for done in found) > 0
    assert {reason for _, reason, _ in right} == {"stop", "length"}


def test_a_grammar_that_breaks_ends_its_request_alone(engine, monkeypatch):
    bits = Matcher.bits

    def broken(self):
        if threading.current_thread().name == "qllm-engine" and self is first[0]:
            raise GrammarError("grammar: too much work")
        return bits(self)

    first = []
    matcher = Grammars.matcher
    monkeypatch.setattr(Grammars, "matcher", lambda *args: first.append(matcher(*args)) or first[-1])
    monkeypatch.setattr(Matcher, "bits", broken)
    streams = [engine.submit("x", max_new_tokens=40, grammar=Grammar.regex("(ab)+"), seed=i) for i in range(3)]
    with pytest.raises(RequestFailed, match="GrammarError: grammar: too much work"):
        streams[0].result()
    assert all(stream.result().text.startswith("ab") for stream in streams[1:])


def test_a_tokenizer_is_read_once(tokenizer, monkeypatch):
    read = []
    from_tokenizer = llguidance.hf.from_tokenizer
    monkeypatch.setattr(llguidance.hf, "from_tokenizer", lambda *args: read.append(1) or from_tokenizer(*args))
    grammars = Grammars(tokenizer, VOCABULARY)
    for grammar in (Grammar.regex(""), Grammar.json_object()):
        grammars.matcher(grammar)
    assert read == [1]


def test_tokens_that_do_not_follow_the_grammar_break_it(tokenizer):
    matcher = Grammars(tokenizer, VOCABULARY).matcher(Grammar.regex("ab"))
    matcher.accept(tokenizer.encode("z"))
    with pytest.raises(GrammarError, match="grammar: "):
        matcher.bits()


def test_a_grammar_is_compiled_once_and_a_bounded_number_is_kept(tokenizer, monkeypatch):
    grammars = Grammars(tokenizer, VOCABULARY)
    compiled = []
    compile_one = Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, g: compiled.append(g.text) or compile_one(self, g))
    monkeypatch.setattr(grammar_module, "MOST_COMPILED", 2)
    for text in ("a", "b", "a", "c", "a", "b"):
        one, other = (grammars.matcher(Grammar.regex(text)) for _ in range(2))
        one.accept(tokenizer.encode(text))
        assert one.bits() != other.bits()
        assert len(grammars._compiled) <= 2
    assert compiled == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.regex("a(b"),
        Grammar.json_schema({"type": "foo"}),
        Grammar.json_schema({"$ref": "#/nowhere"}),
        Grammar.json_schema({"$ref": "#"}),
        Grammar.regex("\ud800"),
        Grammar("json_schema", "{"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_in_a_line(engine, grammar):
    with pytest.raises(GrammarError, match="grammar") as found:
        engine.submit("x", grammar=grammar)
    assert len(str(found.value)) < 400
    assert "\n" not in str(found.value)
    assert engine.submit("x", max_new_tokens=1, stop=()).result().finish_reason == "length"


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_a_grammar_needs_a_fast_tokenizer(model, tokenizer):
    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars(tokenizer, VOCABULARY, frozenset({END})).matcher(Grammar.regex("a"))


def test_without_llguidance_the_extra_is_named(tokenizer, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GrammarError, match=re.escape("pip install 'qllm-moe[grammar]'")):
        Grammars(tokenizer, VOCABULARY).matcher(Grammar.regex("a"))


def test_a_response_format_of_openai_names_a_grammar():
    schema = {"type": "object"}
    given = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert Grammar.response_format(given) == Grammar.json_schema(schema) == Grammar.json_object()
    assert Grammar.response_format({"type": "json_object"}) == Grammar.json_object()
    assert Grammar.response_format({"type": "regex", "regex": "a+"}) == Grammar.regex("a+")
    assert Grammar.response_format({"type": "text"}) is Grammar.response_format(None) is None
    for bad in ({"type": "xml"}, {}, "json_object", {"type": "json_schema"}, {"type": "regex"}, [], 5):
        with pytest.raises(SamplingError, match="response_format"):
            Grammar.response_format(bad)


@pytest.mark.parametrize(
    "schema", [None, 5, [], True, "nothing", "[]", {1: object()}, float("nan"), {"a": float("nan")}]
)
def test_a_schema_that_is_no_json_is_refused(schema):
    with pytest.raises(SamplingError, match="JSON schema"):
        Grammar.json_schema(schema)
