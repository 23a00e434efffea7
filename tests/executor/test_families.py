"""Every MoE family of the installed transformers: the same greedy tokens as `generate`, or a refusal that says why."""

from collections.abc import Iterable

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.checks import auto_class, check_config
from qllm.executor.model.loading import load_model, prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import whole
from qllm.executor.testing import MAX_PARAMETERS, families, run_batch, tiny_config, tiny_model
from tests.engine_worlds import finest

pytestmark = pytest.mark.usefixtures("one_thread")
NEW_TOKENS = 10
FAMILIES = families()
#: those whose state beside keys and values is kept for each sequence
RECURRENT = {
    *("bailing_hybrid", "granitemoehybrid", "kimi_linear", "lfm2_moe", "nemotron_h"),
    *("minimax", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "jamba"),
}
#: those whose attention is called for one sequence at a time
UNPACKED = {
    *("axk2", "deepseek_v32", "dots3_note_text", "glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4"),
    *("inkling_mm_model", "inkling_text", "zaya"),
}
if Version(transformers.__version__) < Version("5.24"):
    UNPACKED |= {"inkling2", "inkling2_text"}  # later ones attend over blocks of residuals, too, which is not causal
else:
    RECURRENT |= {"lara_mini"}


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (5, 1, 21, 12)]


def generate(model, prompt):
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def states(texts, block_size=4):
    """Sequences whose blocks are interleaved in the cache."""
    return [Sequence(list(t), list(range(i, i + 9 * len(texts), len(texts)))) for i, t in enumerate(texts)]


def served(model, splitter):
    with torch.inference_mode():
        return run_batch(Runner(model, kv_blocks=40, block_size=4, splitter=splitter), states(prompts()), NEW_TOKENS)


def language_model(model_type):
    """A tiny random model, of those too that are refused."""
    try:
        config = tiny_config(model_type)
        model_class = auto_class(config)
        with torch.device("meta"):
            size = model_class.from_config(config).num_parameters()
    except Exception as error:
        pytest.skip(f"no tiny configuration of {model_type} is known: {error}")
    if size > MAX_PARAMETERS:
        pytest.skip(f"no tiny configuration of {model_type} is known")
    torch.manual_seed(0)
    return model_class.from_config(config, dtype=torch.float32).eval()


def tensors_in(cache):
    """Names of what a cache and its layers hold in tensors."""
    found = set()
    for holder in (cache, *getattr(cache, "layers", ())):
        for name, value in vars(holder).items():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            found |= {name} if any(isinstance(v, torch.Tensor) for v in values) else set()
    return found


def keys_and_values():
    """What the cache of a model holds that only attends, within windows and without."""
    cache = DynamicCache(config=tiny_config("gpt_oss"))
    for layer in range(len(cache.layers)):
        cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), layer)
    return tensors_in(cache)


def seen_in(model: PreTrainedModel) -> Iterable[str]:
    """What rules a model out, as its own passes without our hooks show it."""
    if any(getattr(module, "_is_stateful", False) for module in model.modules()):  # so transformers calls it
        return ["outside attention"]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
        first = model(input_ids=ids, use_cache=False).logits[0, 0]
        ids[0, -1] = 50
        other = model(input_ids=ids, use_cache=False).logits[0, 0]
    reasons = ["outside attention"] if tensors_in(out.past_key_values) - keys_and_values() else []
    return reasons if torch.allclose(first, other, atol=1e-5) else [*reasons, "not causal"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_same_tokens_as_generate_with_a_point_everywhere_or_a_reason_why_not(model_type):
    model = language_model(model_type)
    reasons = seen_in(model)
    if model_type in RECURRENT | UNPACKED:
        assert reasons == ["outside attention"]
    elif reasons:
        with pytest.raises(UnsupportedModelError, match=r"outside attention|not causal|breaks"):
            prepare_model(model)
        return
    expected = [generate(model, p) for p in prompts()]
    prepare_model(model)
    assert served(model, finest) == expected
    assert served(model, whole) == expected


def test_well_known_families_are_among_them():
    known = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_vl_moe", "gemma4", "qwen3_next", "jamba"}
    assert known | RECURRENT | UNPACKED <= set(FAMILIES)
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize("model_type", ["deepseek_v4", "unlimited_ocr"])
def test_state_outside_attention_is_told_by_the_configuration_alone(model_type):
    with pytest.raises(UnsupportedModelError, match=f"{model_type}: keeps state outside attention"):
        check_config(tiny_config(model_type))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_sliding_windows_that_are_off_by_default(model_type):
    model = tiny_model(model_type, sliding_window=6, use_sliding_window=True, max_window_layers=2)
    expected = [generate(model, p) for p in prompts()]
    assert served(prepare_model(model), finest) == expected


def test_prompts_computed_in_chunks_of_any_size_give_the_same_tokens():
    model = tiny_model("gpt_oss")
    expected = [generate(model, p) for p in prompts()]
    runner = Runner(prepare_model(model), kv_blocks=40, block_size=4)
    sequences = states(prompts())
    with torch.inference_mode():
        for n in (3, 7, 1, 30):  # while one prefills, the others decode
            running = runner.begin((s, min(n, len(s.tokens) - s.computed)) for s in sequences)
            logits = run_to_end(running)
            for entry, token in zip(running.sampled, logits.argmax(-1).tolist(), strict=True):
                entry.seq.tokens.append(token)
        run_batch(runner, sequences, NEW_TOKENS)
    for sequence, prompt, tokens in zip(sequences, prompts(), expected, strict=True):
        assert sequence.tokens[len(prompt) :][:NEW_TOKENS] == tokens


@pytest.mark.parametrize(
    "model_type", sorted({"mixtral", "gpt_oss", "deepseek_v3", "minimax_m2", "beam", "laguna"} & set(FAMILIES))
)
def test_rounding_in_half_precision_is_not_taken_for_lost_state(model_type):
    prepare_model(tiny_model(model_type).bfloat16())


def test_a_saved_checkpoint_loads_with_the_hooks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model("olmoe")
    expected = [generate(model, p) for p in prompts()]
    model.save_pretrained(tmp_path)
    assert served(load_model(tmp_path), finest) == expected


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("dbrx", "experts interface"), ("llama", "experts interface"), ("jetmoe", "experts interface")],
)
def test_models_whose_experts_hook_never_fires_are_refused(model_type, reason):
    overrides = {}
    if model_type == "dbrx":
        overrides = {
            "d_model": 64, "n_heads": 4, "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        }  # fmt: skip
    if model_type == "jetmoe":
        overrides = {"kv_channels": 16}
    with pytest.raises(UnsupportedModelError, match=reason):
        prepare_model(tiny_model(model_type, **overrides))


def test_encoder_decoder_is_refused():
    from transformers import SwitchTransformersConfig

    from qllm.executor.model.checks import check_config

    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_config(SwitchTransformersConfig())
