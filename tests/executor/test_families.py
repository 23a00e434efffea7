"""Every MoE family of the installed transformers: the same greedy tokens as `generate`, or a refusal that says why."""

import pytest
import torch

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.loading import load_model, prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import whole
from qllm.executor.testing import families, run_batch, tiny_model
from tests.engine_worlds import finest

pytestmark = pytest.mark.usefixtures("one_thread")
NEW_TOKENS = 10
FAMILIES = {package: model_type for package, model_type in families().items() if model_type is not None}

#: Families that keep state outside attention, or attend by an index of their own. All the others must be served.
REFUSED = {
    "axk2",
    "bailing_hybrid",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note",
    "glm_moe_dsa",
    "granitemoehybrid",
    "hy_v4",
    "inkling",
    "inkling2",
    "inkling2_loop",
    "jamba",
    "kimi_linear",
    "lara_mini",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
    "zaya",
}


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


@pytest.mark.parametrize("package", sorted(set(FAMILIES) - REFUSED))
def test_same_tokens_as_generate_with_a_point_everywhere(package):
    model = tiny_model(FAMILIES[package])
    expected = [generate(model, p) for p in prompts()]
    prepare_model(model)
    assert served(model, finest) == expected
    assert served(model, whole) == expected


@pytest.mark.parametrize("package", sorted(set(FAMILIES) & REFUSED))
def test_state_outside_attention_is_refused(package):
    with pytest.raises(UnsupportedModelError, match="outside attention"):
        prepare_model(tiny_model(FAMILIES[package]))


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
    "package", sorted({"mixtral", "gpt_oss", "deepseek_v3", "minimax_m2", "beam", "laguna"} & set(FAMILIES))
)
def test_rounding_in_half_precision_is_not_taken_for_lost_state(package):
    prepare_model(tiny_model(FAMILIES[package]).bfloat16())


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
