"""The text of prompts, and where a request ends by default, with tokenizers as checkpoints bring them."""

import json
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from qllm.executor import Engine, LoadError
from qllm.executor.calibration.routing import record_popularity
from qllm.executor.engine.text import load_tokenizer, prompt_ids
from qllm.executor.errors import CalibrationError
from qllm.executor.model.info import stop_ids
from qllm.executor.model.loading import LoadedModel, prepare_model
from qllm.executor.testing import tiny_config, tiny_model
from qllm.scheduler import Limits

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = {"<s>": 0, "</s>": 1, "<sop>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 96)}
LIMITS = Limits(kv_blocks=64, block_size=4)


def tokenizer(added="", eos="</s>"):
    """A tokenizer of words, which adds these special tokens around a prompt: "<s> $A" for one at its beginning."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added:
        special = [(word, WORDS[word]) for word in added.split() if word != "$A"]
        made.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=eos, additional_special_tokens=["<sop>"]
    )


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("added", "text", "tokens"),
    [
        ("<s> $A", "w5 w6", [0, 5, 6]),
        ("<s> $A", "<s>w5 w6", [0, 5, 6]),  # as a chat template writes it
        ("<s> $A", "<s> w5", [0, 5]),
        ("<s> $A", "<s><s>w5", [0, 0, 5]),  # as it stands there
        ("<s> $A", "w5<s>", [0, 5, 0]),
        ("<s> $A", "<s>", [0]),
        ("<s> $A", "", [0]),
        ("<s> <sop> $A", "<s><sop>w5", [0, 2, 5]),
        ("<s> <sop> $A", "w5", [0, 2, 5]),
        ("<s> <sop> $A", "<s>w5", [0, 2, 0, 5]),
        ("<s> $A </s>", "<s>w5", [0, 5, 1]),
        ("$A </s>", "w5</s>", [5, 1, 1]),
        ("", "<s>w5", [0, 5]),
        ("", "<s><s>w5", [0, 0, 5]),
        ("", "w5", [5]),
    ],
)
def test_a_prompt_gets_the_special_tokens_once(added, text, tokens):
    assert prompt_ids(tokenizer(added), text) == tokens


def test_the_text_of_a_chat_template_gives_the_tokens_of_the_template(model):
    made = tokenizer("<s> $A")
    made.chat_template = "{{ bos_token }}{% for m in messages %}<sop>{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "w7 w8"}]
    text = made.apply_chat_template(chat, tokenize=False)
    with Engine(model, made, limits=LIMITS) as engine:
        streams = [engine.submit(prompt, max_new_tokens=2) for prompt in (text, made.apply_chat_template(chat))]
        assert [stream.prompt for stream in streams] == [[0, 2, 7, 8]] * 2
        assert streams[0].result().tokens == streams[1].result().tokens


@pytest.mark.parametrize(
    ("generation", "config", "eos", "expected"),
    [
        (2, 3, None, {2}),
        ([2, 4], 3, None, {2, 4}),
        (2, 3, "</s>", {1, 2}),
        (None, 3, "</s>", {1, 3}),  # a generation configuration that names none
        (None, [3, 5], None, {3, 5}),
        (None, None, "</s>", {1}),
        (None, None, None, set()),
    ],
)
def test_requests_end_at_the_tokens_of_the_generation_configuration_and_of_the_tokenizer(
    model, monkeypatch, generation, config, eos, expected
):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=generation))
    monkeypatch.setattr(model.config, "eos_token_id", config)
    assert stop_ids(model, tokenizer(eos=eos)) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1000, set()),
        ([2, 96], {2}),
        ([-1, 2], {2}),
        (["</s>", 2], {2}),
        ([2.5], set()),
        ([True, 3], {3}),
        ([None], set()),
        ([[2]], set()),
        ({"id": 2}, set()),
    ],
)
def test_stop_tokens_that_the_model_lacks_are_ignored_with_one_warning(model, monkeypatch, caplog, given, expected):
    monkeypatch.setattr(model.generation_config, "eos_token_id", given)
    with caplog.at_level(logging.WARNING), Engine(model, limits=LIMITS) as engine:
        for _ in range(2):
            assert engine.submit([5, 6], max_new_tokens=2).result().tokens
        assert stop_ids(model) == expected
    told = [message for message in caplog.messages if message.startswith("stop tokens ignored: ")]
    assert len(told) == 2  # the engine's, and that of the line above
    assert told[0].endswith("; allowed: token ids from 0 to 95")


def test_a_request_ends_at_the_tokenizers_end_of_text(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    monkeypatch.setattr(model.config, "eos_token_id", None)
    with Engine(model, limits=LIMITS) as engine:
        free = engine.submit([5, 6], max_new_tokens=8).result()
    last = free.tokens[3]
    word = next(word for word, token in WORDS.items() if token == last)
    with Engine(model, tokenizer(eos=word), limits=LIMITS) as engine:
        ended = engine.submit([5, 6], max_new_tokens=8).result()
        assert engine.submit([5, 6], max_new_tokens=8, stop=()).result().tokens == free.tokens
    assert (free.finish_reason, ended.finish_reason) == ("length", "stop")
    assert ended.tokens == free.tokens[: free.tokens.index(last) + 1]


# The tokenizer of a checkpoint


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "olmoe"])
def test_a_checkpoint_without_tokenizer_takes_token_ids(tmp_path, model_type):
    tiny_config(model_type).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None


def test_an_empty_tokenizer_is_none(tmp_path):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["nowhere/at-all", "/nowhere/to/be/found", ""])
def test_a_checkpoint_that_is_not_there_is_what_is_told(name):
    with pytest.raises(LoadError, match=r"cannot be loaded|no config\.json"):
        Engine.from_pretrained(name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"tokenizer_class": "Nonsense"}'),
        ("tokenizer.model", "no model"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_told_before_the_model_is(tmp_path, file, content):
    tiny_config("mixtral").save_pretrained(tmp_path)  # no weights
    (tmp_path / file).write_text(content)
    with pytest.raises(LoadError, match=f"{tmp_path}: its tokenizer cannot be loaded: ") as refused:
        Engine.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_with_tokenizer_takes_text(tmp_path):
    tiny_model("qwen3_moe", num_hidden_layers=2).save_pretrained(tmp_path)
    tokenizer("<s> $A").save_pretrained(tmp_path)
    with Engine.from_pretrained(tmp_path, limits=LIMITS) as engine:
        stream = engine.submit("<s>w5 w6", max_new_tokens=3)
        result = stream.result()
    assert stream.prompt == [0, 5, 6]
    assert result.text == tokenizer().decode(result.tokens, skip_special_tokens=True)


def test_the_routing_of_prompts_needs_a_tokenizer(tmp_path):
    loaded = LoadedModel.of("tiny", prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2)))
    loaded.model.config.save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7\n")
    given = (loaded, str(tmp_path), tmp_path / "prompts.txt", tmp_path / "popularity.csv", 16)
    with pytest.raises(CalibrationError, match=r"--prompts needs a tokenizer, and .* has none"):
        record_popularity(*given)
    tokenizer("<s> $A").save_pretrained(tmp_path)
    assert record_popularity(*given) == 5
