"""Every checkpoint loads, or is refused in one line that names it, before weights are read where files can tell."""

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.model import loading
from qllm.executor.model.checks import expand_weights
from qllm.executor.model.loading import load, load_model, prepare_model, random_model
from qllm.executor.testing import tiny_config, tiny_model
from tests.engine_worlds import finest
from tests.executor.test_families import generate, prompts, served

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00009.safetensors"
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model("qwen3_moe", num_hidden_layers=2)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="60KB")
    return folder


@pytest.fixture
def whole(saved, tmp_path):
    return shutil.copytree(saved / "whole", tmp_path / "checkpoint")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved / "sharded", tmp_path / "checkpoint")


def configure(folder, **values):
    """Set values of config.json; those that are `...` are taken out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder):
    """What a checkpoint is refused with: one line, which names it."""
    with pytest.raises((LoadError, UnsupportedModelError)) as refused:
        load_model(folder)
    told = str(refused.value)
    assert "\n" not in told
    assert told.startswith(f"{folder}: ")
    return told.removeprefix(f"{folder}: ")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

BROKEN_FOLDERS = {
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "config.json' is not a valid JSON file": lambda f: (f / "config.json").write_text("{model_type: "),
    "config.json' is not a valid JSON": lambda f: (f / "config.json").write_bytes(bytes(range(128, 256))),
    "not a valid JSON file": lambda f: (f / "config.json").write_text(POINTER),
    "model_type": lambda f: (f / "config.json").write_text("{}"),
    "TypeError": lambda f: (f / "config.json").write_text("3"),
    "no file named model.safetensors": lambda f: (f / WEIGHTS).unlink(),
    "model.safetensors is damaged .*incomplete metadata": lambda f: cut(f / WEIGHTS, 10_000),
    "model.safetensors is damaged .*invalid header": lambda f: cut(f / WEIGHTS, 50),
    "model.safetensors is damaged .*header too small": lambda f: cut(f / WEIGHTS, 0),
    "model.safetensors is damaged": lambda f: (f / WEIGHTS).write_bytes(b"garbage" * 100),
    "model.safetensors is a Git LFS pointer": lambda f: (f / WEIGHTS).write_text(POINTER),
    "UnpicklingError|Weights only load failed": lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
    "no file named model": lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"),
}


@pytest.mark.parametrize("told", BROKEN_FOLDERS)
def test_a_broken_folder_is_refused(whole, told):
    BROKEN_FOLDERS[told](whole)
    assert re.search(told, refusal(whole))


BROKEN_SHARDS = {
    f"{SHARD} is missing; the index names it": lambda f: (f / SHARD).unlink(),
    f"{SHARD} is damaged": lambda f: cut(f / SHARD, -10),
    "no file named model.safetensors": lambda f: (f / INDEX).unlink(),
    f"{INDEX} cannot be read": lambda f: (f / INDEX).write_text("{"),
    f"{INDEX} cannot be read .*weight_map": lambda f: (f / INDEX).write_text("{}"),
    "nowhere.safetensors is missing": lambda f: change_index(
        f, lambda index: index["weight_map"].update({"lm_head.weight": "nowhere.safetensors"})
    ),
}


@pytest.mark.parametrize("told", BROKEN_SHARDS)
def test_a_broken_set_of_shards_is_refused(sharded, told):
    BROKEN_SHARDS[told](sharded)
    assert re.search(told, refusal(sharded))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere/at-all", "cannot be loaded: .*; allowed: a folder or a model hub's name"),
        ("/nowhere/to/be/found", "cannot be loaded: .*; allowed: a folder or a model hub's name"),
        ("", "cannot be loaded|no config.json"),
    ],
)
def test_what_is_not_there_is_refused(name, told):
    with pytest.raises(LoadError, match=told) as refused:
        load_model(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "nonsense"}, "`nonsense` but Transformers does not recognize"),
        ({"model_type": None}, "model type `None`"),
        ({"model_type": ...}, "model_type"),
        ({"model_type": "clip"}, "clip: transformers has no language model of this type"),
        ({"model_type": "llama"}, "llama: no layer has experts"),
        ({"model_type": "llama4_text"}, "chunked attention"),
        ({"auto_map": {"AutoConfig": "c.C"}, "model_type": "mine"}, "code that comes with the checkpoint"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": -1}, "no model can be made of its config.json"),
        ({"hidden_act": "nonsense"}, "no model can be made of its config.json: KeyError: 'nonsense'"),
        ({"num_attention_heads": 0}, "no model can be made of its config.json"),
        ({"pad_token_id": 1000}, "no model can be made of its config.json"),
        ({"vocab_size": 0}, "no model can be made of its config.json"),
        ({"dtype": "int9"}, "int9"),
        ({"dtype": "int8"}, "int8"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_hidden_layers": 0}, "no layer has experts"),
        ({"num_hidden_layers": 3}, "its files lack model.layers.2.* and 10 more weights"),
        ({"vocab_size": 97}, r"lm_head.weight is \[96, 64\] in its files and \[97, 64\] by its config.json"),
        ({"moe_intermediate_size": 16}, r"experts.down_proj is \[8, 64, 32\] in its files and \[8, 64, 16\]"),
        ({"head_dim": 8}, "in its files and"),
        ({"num_experts_per_tok": 99}, "a pass over 8 tokens breaks: RuntimeError: selected index k out of range"),
        ({"num_experts_per_tok": 0}, "its tokens go to no expert"),
        ({"max_position_embeddings": 0}, "a pass over 8 tokens breaks: position"),
    ],
)
def test_an_odd_configuration_is_refused(whole, values, told):
    configure(whole, **values)
    assert re.search(told, refusal(whole))


def widen(weights):
    weights[EXPERT] = weights[EXPERT][:10].contiguous()


def to_integers(weights):
    weights.update({name: (10 * weight).to(torch.int8) for name, weight in weights.items()})


def to_nan(weights):
    weights.update({name: weight * float("nan") for name, weight in weights.items()})


def rename(weights):
    weights.update({f"module.{name}": weights.pop(name) for name in list(weights)})


ODD_WEIGHTS = {
    "its files lack model.norm.weight, which": lambda weights: weights.pop("model.norm.weight"),
    "its files lack lm_head.weight, which": lambda weights: weights.pop("lm_head.weight"),
    "its files lack lm_head.weight and 24 more weights": lambda weights: weights.clear(),
    "its files lack lm_head.weight and 24 more": rename,
    "experts.gate_up_proj cannot be put together: Sizes of tensors must match": lambda w: w.pop(EXPERT),
    "experts.gate_up_proj cannot be put together: stack expects": widen,
    "is quantised .I8., but config.json has no quantization_config": to_integers,
    "its logits are not finite: the weights are damaged, or too large for float32": to_nan,
}


@pytest.mark.parametrize("told", ODD_WEIGHTS)
def test_weights_that_are_not_those_of_the_configuration_are_refused(whole, told, capfd):
    change_weights(whole, ODD_WEIGHTS[told])
    assert re.search(told, refusal(whole))
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_that_are_not_of_the_model_are_named(whole, caplog):
    change_weights(whole, lambda weights: weights.update({"foo.bar": torch.zeros(3), "foo.baz": torch.zeros(3)}))
    with caplog.at_level(logging.WARNING):
        load_model(whole)
    assert f"{whole}: not of this model, left out: foo.bar and 1 more weights" in caplog.messages


def test_a_pickled_checkpoint_loads(whole):
    torch.save(load_file(whole / WEIGHTS), whole / "pytorch_model.bin")
    expected = load_model(whole).config
    (whole / WEIGHTS).unlink()
    assert load_model(whole).config.to_dict() == expected.to_dict()


def test_a_model_that_does_not_fit_is_refused(whole, monkeypatch):
    monkeypatch.setattr(loading, "memory_bytes", lambda device: (10**5, 10**5))
    (whole / WEIGHTS).unlink()  # it is refused before they are looked for
    assert refusal(whole).startswith("does not fit: 0 GB of weights in float32, cpu has 0 GB; choose")


def test_an_option_of_the_command_line_is_named(whole):
    (whole / WEIGHTS).write_bytes(b"")
    with pytest.raises(LoadError, match=f"--model {whole}: model.safetensors is damaged"):
        load(str(whole))
    with pytest.raises(LoadError, match="--device abacus"):
        load_model(whole, device="abacus")
    with pytest.raises(LoadError, match="--dtype int3"):
        load_model(whole, dtype="int3")


# Composite models


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "mistral4", "aria", "gemma4"])
def test_a_composite_checkpoint_gives_the_tokens_of_generate(tmp_path, model_type):
    model = tiny_model(model_type)
    expected = [generate(model, prompt) for prompt in prompts()]
    model.save_pretrained(tmp_path)
    assert served(load_model(tmp_path), finest) == expected


def test_a_composite_model_gets_random_weights(tmp_path):
    tiny_config("qwen3_vl_moe").save_pretrained(tmp_path)
    assert load(str(tmp_path), random_weights=True).layers == 4


# Quantised weights


@pytest.mark.parametrize("method", sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING, "modelopt", "nonsense"}))
def test_weights_of_every_quantisation_are_expanded_or_refused_whatever_the_device(tmp_path, method):
    given = {"quant_method": method}
    if method.startswith("bitsandbytes"):
        given = {"quant_method": "bitsandbytes", f"load_in_{method.removeprefix('bitsandbytes_')}": True}
    config = tiny_config("qwen3_moe")
    config.quantization_config = given
    if method in ("fp8", "mxfp8", "mxfp4", "compressed-tensors", "metal"):
        assert expand_weights(config) == method
        assert config.quantization_config["dequantize"]
    else:
        config.save_pretrained(tmp_path)
        configure(tmp_path, quantization_config=given)
        assert refusal(tmp_path).startswith(  # the folder holds no weights
            f"qwen3_moe: its weights are quantised ({method}), and transformers cannot expand them at load; allowed: "
        )


def plain_and_quantised(tmp_path, model, quantise, settings):
    """A quantised checkpoint, and one of the plain weights that its own stand for."""
    folders = tmp_path / "plain", tmp_path / "quantised"
    for folder in folders:
        model.save_pretrained(folder)
    plain, quantised = {}, {}
    for name, weight in load_file(folders[0] / WEIGHTS).items():
        plain[name], parts = quantise(name, weight)
        quantised |= {name + suffix: part for suffix, part in parts.items()}
    save_file(plain, folders[0] / WEIGHTS, {"format": "pt"})
    save_file(quantised, folders[1] / WEIGHTS, {"format": "pt"})
    configure(folders[1], quantization_config=settings)
    return folders


def to_fp8(block):
    def quantise(name, weight):
        if not name.endswith(("proj.weight", "proj_with_mqa.weight")):
            return weight, {"": weight}
        rows, columns = weight.shape
        grid = torch.empty(-(-rows // block), -(-columns // block))
        packed = torch.empty(rows, columns)
        for i, j in torch.cartesian_prod(*map(torch.arange, grid.shape)).tolist():
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            grid[i, j] = weight[part].float().abs().max() / 448
            packed[part] = (weight[part] / grid[i, j]).to(torch.float8_e4m3fn).float()
        scales = grid.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        return (packed * scales).bfloat16(), {"": packed.to(torch.float8_e4m3fn), "_scale_inv": grid}

    return quantise, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_mxfp4(name, weight):
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return weight, {"": weight}
    experts, rows, columns = weight.shape
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, columns, rows // 32, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(120, 125, blocks.shape[:3], generator=draw, dtype=torch.uint8)
    values = torch.cat([E2M1, -E2M1])[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
    plain = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2).contiguous()
    return plain.bfloat16(), {"_blocks": blocks, "_scales": scales}


@pytest.mark.parametrize(("model_type", "block"), [("qwen3_moe", 32), ("qwen3_moe", 128), ("deepseek_v3", 32)])
def test_fp8_weights_are_expanded(tmp_path, model_type, block):
    pytest.importorskip("accelerate")
    model = tiny_model(model_type, num_hidden_layers=2).bfloat16()
    plain, quantised = plain_and_quantised(tmp_path, model, *to_fp8(block))
    same_weights(load_model(plain), load_model(quantised))


def test_mxfp4_weights_are_expanded(tmp_path):
    model = tiny_model("gpt_oss", num_hidden_layers=2).bfloat16()
    same_weights(*map(load_model, plain_and_quantised(tmp_path, model, to_mxfp4, {"quant_method": "mxfp4"})))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_without_a_scale_get_the_type_that_was_asked_for(tmp_path, dtype):
    model = tiny_model("ernie4_5_moe", num_hidden_layers=2).bfloat16()
    _, quantised = plain_and_quantised(tmp_path, model, *to_fp8(32))
    found = load_model(quantised, dtype=dtype)
    for name, weight in found.named_parameters():
        exempt = name.endswith(("gate.weight", "moe_statics.e_score_correction_bias"))  # the model keeps float32
        assert exempt or weight.dtype is getattr(torch, dtype), name


def same_weights(one, other):
    assert other.dtype is one.dtype is torch.bfloat16
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize(("model_type", "block"), [("qwen3_moe", 48), ("deepseek_v3", 16)])
def test_fp8_blocks_that_transformers_would_misread_are_expanded(tmp_path, model_type, block):
    # findings/fp8_blocks_misread.sh
    model = tiny_model(model_type, num_hidden_layers=2).bfloat16()
    plain, quantised = plain_and_quantised(tmp_path, model, *to_fp8(block))
    same_weights(load_model(plain), load_model(quantised))


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_a_package_that_is_missing_is_named(whole, method, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: False)
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    configure(whole, quantization_config={"quant_method": method})
    package = {"fp8": "accelerate"}.get(method, method)
    assert f"pip install {package}" in refusal(whole)


# Sizes at the edge

nothing_to_initialise = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@nothing_to_initialise
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("deepseek_v3", {"n_shared_experts": 0}),
        ("deepseek_v3", {"first_k_dense_replace": 0}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("deepseek_v3", {"qk_nope_head_dim": 0}),
        ("deepseek_v3", {"n_routed_experts": 1, "num_experts_per_tok": 1}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
        ("granitemoeshared", {"shared_intermediate_size": 0}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
        ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}),
        ("qwen3_moe", {"num_experts_per_tok": 8}),
        ("qwen3_moe", {"moe_intermediate_size": 1}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
        ("qwen3_moe", {"num_hidden_layers": 1}),
        ("qwen3_moe", {"num_key_value_heads": 1, "head_dim": 2}),
        ("gpt_oss", {"num_local_experts": 1, "num_experts_per_tok": 1}),
        ("gpt_oss", {"intermediate_size": 1}),
    ],
)
def test_sizes_at_the_edge_are_served(model_type, sizes):
    model = tiny_model(model_type, **sizes)
    model.set_experts_implementation("eager")  # transformers' grouped products cannot do all of them
    expected = [generate(model, prompt) for prompt in prompts()]
    assert served(prepare_model(model), finest) == expected


@nothing_to_initialise
@pytest.mark.parametrize(
    ("model_type", "sizes", "told"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 4}, "no layer has experts"),
        ("qwen3_moe", {"decoder_sparse_step": 99}, "no layer has experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "a pass over 8 tokens breaks"),
        ("deepseek_v3", {"n_group": 3}, "a pass over 8 tokens breaks"),
        ("deepseek_v3", {"v_head_dim": 0}, "a pass over 8 tokens breaks"),
    ],
)
def test_sizes_of_no_model_are_refused(model_type, sizes, told):
    with pytest.raises(UnsupportedModelError, match=f"{model_type}: .*{told}"):
        prepare_model(tiny_model(model_type, **sizes))


def test_a_model_of_a_single_token_is_served():
    prepare_model(tiny_model("qwen3_moe", vocab_size=1, bos_token_id=0, eos_token_id=0))


def test_weights_are_read_straight_onto_an_accelerator(whole, monkeypatch):
    asked = {}

    def from_pretrained(name, **settings):
        asked.update(settings)
        raise OSError("that is enough")

    monkeypatch.setattr(loading, "checked_device", lambda device: torch.device(device))
    monkeypatch.setattr(loading, "memory_bytes", lambda device: (10**9, 10**9))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(LoadError, match="that is enough"):
        load_model(whole, device="cuda:1")
    assert asked["device_map"] == {"": torch.device("cuda:1")}


def test_a_random_model_is_made_on_its_device_and_prepared_outside_of_it(monkeypatch):
    # `torch.empty(..., pin_memory=True)` inside would make a tensor of that device, which cannot be pinned.
    found = {}

    def prepare(model, experts):
        found.update(made=model.device.type, prepared=torch.empty(1).device.type)
        return model

    monkeypatch.setattr(loading, "prepare_model", prepare)
    random_model(tiny_config("qwen3_moe"), torch.float32, torch.device("meta"))
    assert found == {"made": "meta", "prepared": "cpu"}
