"""A Hugging Face config.json is a shape, or a line that names the file, the key and what is allowed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm.traces import SHAPES, TimingError
from qllm.traces.step_times.hf_config import EXPERTS, shape_from_config, weights_dtype
from qllm.traces.step_times.model_shapes import ModelShape

QWEN = {
    "model_type": "qwen3_moe",
    **{"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128},
    **{"num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960},
    **{"mlp_only_layers": [], "decoder_sparse_step": 1, "tie_word_embeddings": False},
    **{"sliding_window": None, "use_sliding_window": False},
}
MIXTRAL = {
    **{"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    **{"vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None},
}
GPT_OSS = {
    **{"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64},
    **{"num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32},
    **{"experts_per_token": 4, "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128},
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "quantization_config": {"quant_method": "mxfp4"},
}
DEEPSEEK = {
    **{"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128},
    **{"num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3},
    **{"moe_layer_freq": 1, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    **{"v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840},
    "quantization_config": {"quant_method": "fp8"},
}


def written(folder: Path, data: object, make: bool = False) -> Path:
    folder.mkdir(exist_ok=make or folder.is_dir())
    path = folder / "config.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("data", "name", "dtype"),
    [
        (QWEN, "qwen3-30b-a3b", "bf16"),
        (MIXTRAL, "mixtral-8x7b", "bf16"),
        (GPT_OSS, "gpt-oss-20b", "mxfp4"),
        (DEEPSEEK, "deepseek-v3", "fp8"),
    ],
)
def test_published_configs_are_the_known_shapes(tmp_path, data, name, dtype):
    path = written(tmp_path, data)
    assert shape_from_config(path) is SHAPES[name]
    assert shape_from_config(tmp_path) is SHAPES[name]  # its folder
    assert weights_dtype(path) == dtype
    inner = written(tmp_path, {"model_type": "sees", "text_config": data})
    assert shape_from_config(inner) is SHAPES[name]


@given(
    layers=st.integers(1, 60),
    hidden=st.integers(1, 8192),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 8),
    experts=st.integers(1, 256),
    dense=st.integers(0, 3),
    shared=st.integers(0, 2),
)
def test_every_size_arrives(tmp_path_factory, layers, hidden, kv_heads, group, experts, dense, shared):
    dense = min(dense, layers - 1)
    data = {
        **{"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": kv_heads * group},
        **{"num_key_value_heads": kv_heads, "head_dim": 64, "intermediate_size": 96, "moe_intermediate_size": 32},
        **{"n_routed_experts": experts, "num_experts_per_tok": 1, "vocab_size": 1000, "n_shared_experts": shared},
        **{"first_k_dense_replace": dense, "_name_or_path": "Some/Made-Up", "tie_word_embeddings": True},
    }
    shape = shape_from_config(written(tmp_path_factory.mktemp("model"), data))
    assert shape == ModelShape(
        "made-up",
        *(layers, hidden, kv_heads * group, kv_heads, 64, 32, experts, 1, 1000),
        shared_inter=32 * shared,
        dense_layers=dense,
        dense_inter=96 if dense else 0,
        tied=True,
    )


def test_layers_without_experts_count_wherever_they_lie(tmp_path):
    for changed, dense in (
        ({"decoder_sparse_step": 2}, 24),
        ({"mlp_only_layers": [0, 47]}, 2),
        ({"moe_layer_freq": [0, 0] + [1] * 46}, 2),
        ({"moe_layer_freq": 3}, 32),
        ({"first_k_dense_replace": 1}, 1),
    ):
        shape = shape_from_config(written(tmp_path, {**QWEN, **changed}))
        assert (shape.dense_layers, shape.dense_inter) == (dense, 6144)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict.fromkeys(EXPERTS), "key 'num_experts' is missing: 'qwen3_moe' is no MoE model; allowed: num_experts or"),
        ({"hidden_size": None}, "key 'hidden_size' is missing; allowed: hidden_size, a whole number of at least 1"),
        ({"hidden_size": -5}, "key 'hidden_size' is -5; allowed: a whole number of at least 1"),
        ({"hidden_size": 2048.0}, "key 'hidden_size' is 2048.0; allowed: a whole number"),
        ({"num_experts": True}, "key 'num_experts' is true; allowed: a whole number"),
        ({"num_experts": 0}, "key 'num_experts' is 0; allowed: a whole number of at least 1"),
        ({"vocab_size": "many"}, "key 'vocab_size' is 'many'; allowed: a whole number"),
        ({"vocab_size": 10**30}, "key 'vocab_size' is a number of more than 64 bits; allowed: a whole number"),
        ({"num_experts_per_tok": 500}, r"top_k is 500, must be at most experts \(128\)"),
        ({"num_key_value_heads": 5}, r"heads is 32, must be a multiple of kv_heads \(5\)"),
        ({"num_hidden_layers": 10**9}, "key 'num_hidden_layers' makes 128000000000 experts in all"),
        ({"layer_types": ["linear_attention"] * 48}, "key 'layer_types' has 'linear_attention', which no step"),
        ({"layer_types": ["full_attention"]}, r"'layer_types' has 1 layers; allowed: as many as num_hidden_layers"),
        ({"layer_types": "full"}, "key 'layer_types' is 'full'; allowed: a list of full_attention, sliding_attention"),
        ({"mlp_only_layers": {"0": 1}}, "key 'mlp_only_layers' is a mapping; allowed: a list"),
        ({"mlp_only_layers": list(range(48))}, "leaves none of 48 layers with experts; allowed: fewer"),
        ({"moe_layer_freq": [1]}, r"key 'moe_layer_freq' has 1 layers; allowed: as many as num_hidden_layers \(48\)"),
        ({"tie_word_embeddings": "no"}, "key 'tie_word_embeddings' is 'no'; allowed: true or false"),
        ({"index_topk": 2048}, "key 'index_topk' says sparse attention, which no step describes"),
        ({"ssm_state_size": 128}, "key 'ssm_state_size' says state-space layers"),
        ({"kv_lora_rank": 512}, "key 'qk_rope_head_dim' is missing"),
    ],
)
def test_a_bad_key_is_a_line_with_the_file_and_what_is_allowed(tmp_path, changed, message):
    path = written(tmp_path, {**QWEN, **changed})
    with pytest.raises(TimingError, match=message) as caught:
        shape_from_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds a list; allowed: the JSON object of a config.json"),
        ("7", "holds 7; allowed"),
        ("null", "holds nothing; allowed"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "key 'num_experts' is missing: nothing is no MoE model"),
    ],
)
def test_what_is_no_config_is_a_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(TimingError, match=f"{path}: {message}") as caught:
        shape_from_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_a_line(tmp_path):
    with pytest.raises(TimingError, match=r"nowhere: no such file; allowed: a Hugging Face config.json"):
        shape_from_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TimingError, match="cannot be read as JSON"):
        shape_from_config(tmp_path)


@pytest.mark.parametrize("given_", ["exl2", None, 3, "list"])
def test_an_unknown_quantisation_is_a_line(tmp_path, given_):
    config = [1] if given_ == "list" else {"quant_method": given_}
    path = written(tmp_path, {**QWEN, "quantization_config": config})
    with pytest.raises(TimingError, match=r"key 'quantization_config' has quant_method .*; allowed: fp8, mxfp4"):
        weights_dtype(path)


def test_a_name_makes_a_file_name(tmp_path):
    data = {**QWEN, "hidden_size": 1024, "_name_or_path": "me/../A b\\\0c:d"}
    assert shape_from_config(written(tmp_path, data)) == replace(SHAPES["qwen3-30b-a3b"], hidden=1024, name="a-b-c-d")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
MORE = (
    *("mlp_only_layers", "moe_layer_freq", "layer_types"),
    *("text_config", "n_shared_experts", "interleave_moe_layer_step"),
)


@given(base=st.sampled_from((QWEN, GPT_OSS, DEEPSEEK)), value=ODD, data=st.data())
def test_no_value_of_any_key_breaks_the_reader(tmp_path_factory, base, value, data):
    key = data.draw(st.sampled_from(sorted({*base, *MORE})))
    path = written(tmp_path_factory.getbasetemp() / "odd.d", {**base, key: value}, make=True)
    for read in (shape_from_config, weights_dtype):
        told = ""
        try:
            assert isinstance(read(path), ModelShape | str)
        except TimingError as refused:
            told = str(refused)
        assert not told or (told.startswith(f"{path}: ") and "\n" not in told)
