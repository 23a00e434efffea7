"""Experts that stay as FP8 and MXFP4 checkpoints hold them: tokens of the expanded model, in a part of its memory."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

from qllm.cli import app
from qllm.executor.engine.engine import Engine
from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.model.checks import auto_class
from qllm.executor.model.info import dtype_name, model_facts
from qllm.executor.model.loading import LoadedModel, load, load_model, prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import whole
from qllm.executor.quantised.blocks import BlockWeights, scales_shape
from qllm.executor.quantised.experts import experts_form, weights_bytes
from qllm.executor.quantised.testing import FILE, quantise_checkpoint
from qllm.executor.testing import tiny_model
from tests.engine_worlds import ROOMY, finest, serve
from tests.engine_worlds import prompts as lengths
from tests.executor.test_families import generate, served
from tests.executor.test_families import prompts as texts
from tests.executor.test_loading import configure

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
#: Model type, method, block. Blocks larger than a weight, per tensor, and of a row; experts named in three ways.
CHECKPOINTS = {
    "qwen3_moe": ("qwen3_moe", "fp8", (32, 32)),
    "one block a weight": ("deepseek_v3", "fp8", (128, 128)),
    "w1, w2, w3": ("minimax_m2", "fp8", (16, 32)),
    "all experts in a tensor, a scale for each": ("mistral4", "fp8", None),
    "no gate": ("nemotron_h", "mxfp8", None),
    "gpt_oss": ("gpt_oss", "mxfp4", None),
}
SIZES = {
    "qwen3_moe": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 2},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 64},  # which blocks divide
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_thread):
    """Quantised checkpoints, each made once."""
    folders = {}

    def make(which="qwen3_moe"):
        if which not in folders:
            folder = tmp_path_factory.mktemp("checkpoint")
            model_type, method, block = CHECKPOINTS[which]
            model = tiny_model(model_type, **SIZES.get(model_type, {}))
            model.bfloat16().save_pretrained(folder / "plain")
            quantise_checkpoint(folder / "plain", folder / "quantised", method, block)
            folders[which] = folder / "quantised"
        return folders[which]

    return make


@pytest.fixture
def own(made, tmp_path):
    """A copy of a checkpoint, to break."""
    return lambda which="qwen3_moe": shutil.copytree(made(which), tmp_path / "checkpoint")


def change(folder, edit):
    weights = load_file(folder / FILE)
    edit(weights)
    save_file(weights, folder / FILE, {"format": "pt"})


def by_hand(codes, scales, block):
    """A weight of FP8, block by block."""
    scales = torch.exp2(scales.float() - 127) if scales.dtype is torch.uint8 else scales.float()
    plain = codes.float()
    for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape[-2:])).tolist():
        part = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        plain[part] *= scales[..., i, j, None, None]
    return plain


def expanded(folder):
    """The plain float32 model that a checkpoint's weights stand for, loaded by transformers."""
    block = json.loads((folder / "config.json").read_text())["quantization_config"].get("weight_block_size")
    twin = shutil.copytree(folder, folder.parent / "expanded", dirs_exist_ok=True)
    configure(twin, quantization_config=...)
    plain, weights = {}, load_file(folder / FILE)
    for name, weight in weights.items():
        if f"{name}_scale_inv" in weights:
            plain[name] = by_hand(weight, weights[f"{name}_scale_inv"], block or weight.shape[-2:])
        elif name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            plain[stem] = convert_moe_packed_tensors(weight, weights[f"{stem}_scales"], dtype=torch.float32)
        elif not name.endswith(("_scale_inv", "_scales")):
            plain[name] = weight
    save_file(plain, twin / FILE, {"format": "pt"})
    return auto_class(AutoConfig.from_pretrained(twin)).from_pretrained(twin, dtype=torch.float32).eval()


def logits(model, prompt):
    runner = Runner(model, kv_blocks=9, block_size=4)
    with torch.inference_mode():
        return run_to_end(runner.begin([(Sequence(prompt, list(range(9))), len(prompt))]))[0]


# Tokens


@pytest.mark.parametrize("which", CHECKPOINTS)
def test_the_engine_gives_the_tokens_of_the_expanded_model(made, which):
    plain = expanded(made(which))
    expected = [generate(plain, prompt) for prompt in texts()]
    model = load_model(made(which), dtype="float32", experts="packed")
    assert dtype_name(model) == f"float32, experts {CHECKPOINTS[which][1]}"
    assert served(model, finest) == expected
    assert served(model, whole) == expected
    with Engine(model, limits=ROOMY) as engine:
        streams = [engine.submit(prompt, max_new_tokens=10, stop=()) for prompt in texts()]
        assert [stream.result().tokens for stream in streams] == expected
    with torch.inference_mode():
        at_end = plain(input_ids=torch.tensor([texts()[2]])).logits[0, -1]
    assert (logits(model, texts()[2]) - at_end).norm() < 1e-5 * at_end.norm()


@pytest.mark.parametrize("which", ["qwen3_moe", "w1, w2, w3", "no gate", "gpt_oss"])
def test_weights_are_bit_by_bit_those_that_transformers_expands(made, which):
    packed, plain = load_model(made(which), experts="packed"), load_model(made(which))
    modules = dict(plain.named_modules())
    compared = 0
    for name, weights in packed.named_modules():
        if isinstance(weights, BlockWeights):
            path, _, leaf = name.rpartition(".")
            whole_weight = getattr(modules[path], leaf.removeprefix("_qllm_"))
            whole_weight = whole_weight.mT if modules[path].is_transposed else whole_weight
            for number, weight in enumerate(whole_weight):
                assert torch.equal(weights.expanded(number, packed.dtype), weight)
                compared += 1
    assert compared >= 16
    for name, weight in packed.state_dict().items():  # all others are as they were
        assert "_qllm_" in name or torch.equal(weight, plain.state_dict()[name])


@pytest.mark.parametrize(("which", "most"), [("qwen3_moe", 0.51), ("no gate", 0.52), ("gpt_oss", 0.27)])
def test_memory_is_that_of_the_files(made, which, most):
    model = load_model(made(which), dtype="bfloat16", experts="packed")
    kept = [module for module in model.modules() if isinstance(module, BlockWeights)]
    count = sum(len(weights) * weights.expanded(0, torch.bfloat16).numel() for weights in kept)
    taken = sum(weights.nbytes for weights in kept)
    assert taken <= most * 2 * count
    assert {name for name, p in model.named_parameters() if name.endswith(("up_proj", "down_proj"))} == set()
    plain = load_model(made(which), dtype="bfloat16")
    assert weights_bytes(model) == weights_bytes(plain) - 2 * count + taken
    assert LoadedModel.of("one", model).weights_bytes == weights_bytes(model)


# The format


@st.composite
def stacked(draw):
    form = draw(st.sampled_from(["fp8", "mxfp8", "mxfp4"]))
    parts, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    if form == "fp8":
        block = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        return form, parts, outputs, draw(st.integers(1, 17)), block
    return form, parts, outputs, 32 * draw(st.integers(1, 3)), (1, 32)


@settings(max_examples=60, deadline=None)
@given(stacked(), st.integers(0, 2**32 - 1), st.sampled_from([1, 64, 1 << 19]))
def test_every_code_and_every_size_of_block_is_read(shape, seed, at_once):
    form, parts, outputs, inputs, block = shape
    draw = torch.Generator().manual_seed(seed)
    powers = form != "fp8"
    weights = BlockWeights(form, (3, parts * outputs, inputs), block, parts, powers, CPU)
    expected = []
    for which in range(3):
        plain = []
        for part in range(parts):
            bytes_of_row = inputs // 2 if form == "mxfp4" else inputs
            codes = torch.randint(0, 127, (outputs, bytes_of_row), dtype=torch.uint8, generator=draw)  # 127 is NaN
            codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8, generator=draw) << 7
            size = scales_shape((outputs, inputs), block)
            scales = torch.randint(1, 254, size, dtype=torch.uint8, generator=draw) if powers else torch.rand(*size)
            weights.put(which, part, codes, scales)
            if form == "mxfp4":
                lookup = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
                pairs = torch.stack([lookup[(codes & 15).long()], lookup[(codes >> 4).long()]], -1)
                plain.append(by_hand(pairs.flatten(1), scales, block))
            else:
                plain.append(by_hand(codes.view(torch.float8_e4m3fn), scales, block))
        expected.append(torch.cat(plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qllm.executor.quantised.weights.AT_ONCE", at_once)
        for which in range(3):
            assert torch.equal(weights.expanded(which, torch.float32), expected[which])
            assert torch.equal(weights.expanded(which, torch.bfloat16), expected[which].bfloat16())
    x = torch.rand(6, inputs)
    found = weights.products(x, [2, 0], [4, 2])
    assert torch.allclose(found, torch.cat([x[:4] @ expected[2].T, x[4:] @ expected[0].T]), rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("experts", ["plain", "packed"])
def test_blocks_at_the_end_may_be_smaller(made, tmp_path, experts):
    # transformers misreads such weights: findings/fp8_blocks_misread.sh
    quantise_checkpoint(made().parent / "plain", tmp_path / "checkpoint", "fp8", (24, 48))
    plain = expanded(tmp_path / "checkpoint")
    model = load_model(tmp_path / "checkpoint", dtype="float32", experts=experts)
    assert served(model, whole) == [generate(plain, prompt) for prompt in texts()]


# Files


def test_shards_and_layers_that_are_not_quantised(own):
    folder = own()
    plain = expanded(folder)

    def expand_first_layer(weights):
        for name in [name for name in weights if ".layers.0." in name and name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            weights[weight] = by_hand(weights[weight], weights.pop(name), (32, 32))

    change(folder, expand_first_layer)
    weights = load_file(folder / FILE)
    (folder / FILE).unlink()
    shards = {name: f"model-0000{1 + (hash_of(name) % 3)}-of-00003.safetensors" for name in weights}
    for shard in set(shards.values()):
        save_file({name: w for name, w in weights.items() if shards[name] == shard}, folder / shard, {"format": "pt"})
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    model = load_model(folder, dtype="float32", experts="packed")
    assert len([module for module in model.modules() if isinstance(module, BlockWeights)]) == 2  # of the second layer
    assert experts_form(model) == "fp8"
    assert served(model, whole) == [generate(plain, prompt) for prompt in texts()]


def hash_of(name):
    return sum(map(ord, name))


def test_what_is_no_part_of_the_model_is_left_out(own, caplog):
    folder = own()
    change(folder, lambda weights: weights.update({"model.layers.9.mlp.experts.0.up_proj.weight": torch.ones(2, 2)}))
    load_model(folder, experts="packed")
    assert [r.message for r in caplog.records if "left out" in r.message] == [
        f"{folder}: not of this model, left out: model.layers.9.mlp.experts.gate_up_proj"
    ]


# Bad input

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
STACKED = "model.layers.1.mlp.experts.down_proj"


def edit(name, change_one):
    return lambda weights: weights.update({name: change_one(weights[name])})


WRONG = {
    f"its files lack {EXPERT}_scale_inv, the scales of {EXPERT}": lambda w: w.pop(f"{EXPERT}_scale_inv"),
    f"{EXPERT} is BF16; allowed: F8_E4M3, as others of its layer": edit(EXPERT, lambda w: w.bfloat16()),
    f"{EXPERT} is F8_E5M2; allowed: F8_E4M3": edit(EXPERT, lambda w: w.float().to(torch.float8_e5m2)),
    f"{EXPERT} is [32, 32] in its files and [32, 64] by its config.json": edit(EXPERT, lambda w: w[:, :32].clone()),
    f"{EXPERT}_scale_inv is [1, 1]; allowed: [1, 2], one for each block of [32, 32]": edit(
        f"{EXPERT}_scale_inv", lambda w: w[:, :1].clone()
    ),
    f"{EXPERT}_scale_inv is U8; allowed: F32, BF16, F16, F8_E8M0": edit(
        f"{EXPERT}_scale_inv", lambda w: w.to(torch.uint8)
    ),
    "model.layers.1.mlp.experts.0.up_proj.weight and its like: 7 in its files, 8 experts by": lambda w: w.pop(EXPERT),
    "its files lack model.layers.1.self_attn.q_proj.weight_scale_inv": lambda w: w.pop(
        "model.layers.1.self_attn.q_proj.weight_scale_inv"
    ),
}
WRONG_MXFP4 = {
    f"its files lack {STACKED}_scales, the scales of {STACKED}_blocks": lambda w: w.pop(f"{STACKED}_scales"),
    f"{STACKED}_blocks is [8, 64, 1, 16] in its files and [8, 64, 2, 16] by its config.json": edit(
        f"{STACKED}_blocks", lambda w: w[:, :, :1].clone()
    ),
    f"{STACKED}_scales is [8, 64, 1]; allowed: [8, 64, 2], one for each block of [1, 32]": edit(
        f"{STACKED}_scales", lambda w: w[:, :, :1].clone()
    ),
    f"{STACKED}_scales is F32; allowed: U8, F8_E8M0": edit(f"{STACKED}_scales", lambda w: w.float()),
}


def refusal(folder, experts="packed"):
    """What a checkpoint is refused with: one line, which names it."""
    with pytest.raises((LoadError, UnsupportedModelError)) as refused:
        load_model(folder, experts=experts)
    told = str(refused.value)
    assert "\n" not in told
    assert told.startswith(f"{folder}: ")
    return told


@pytest.mark.parametrize(
    ("which", "told"), [*(("qwen3_moe", told) for told in WRONG), *(("gpt_oss", told) for told in WRONG_MXFP4)]
)
def test_weights_that_are_not_as_they_have_to_be_are_named(own, which, told):
    folder = own(which)
    change(folder, (WRONG | WRONG_MXFP4)[told])
    assert told in refusal(folder)


@pytest.mark.parametrize("block", [[32], [0, 32], "32", [32, 32.5], {}])
def test_a_block_that_is_none_is_refused(own, block):
    folder = own()
    settings = {"quant_method": "fp8", "weight_block_size": block}
    configure(folder, quantization_config=settings)
    assert "weight_block_size is" in refusal(folder)
    assert re.search("allowed: two numbers above 0, or null", refusal(folder))


def test_mxfp4_needs_inputs_that_its_blocks_divide(tmp_path, made):
    folder = tmp_path / "checkpoint"
    shutil.copytree(made("gpt_oss"), folder)
    configure(folder, intermediate_size=48)
    assert "model.layers.0.mlp.experts.down_proj_blocks: blocks of 32 do not divide 48 inputs" in refusal(folder)


def test_checkpoints_whose_experts_are_not_quantised_are_refused(own, made):
    folder = own()
    configure(folder, quantization_config=...)
    ways = "allowed: fp8, mxfp8, mxfp4, or experts plain or nf4"
    assert refusal(folder).endswith(f"experts cannot stay packed: its weights are not quantised; {ways}")
    configure(folder, quantization_config={"quant_method": "compressed-tensors"})
    assert refusal(folder).endswith(f"its weights are quantised (compressed-tensors); {ways}")
    configure(folder, quantization_config={"quant_method": "nonsense"})
    assert "its weights are quantised (nonsense)" in refusal(folder)
    shutil.rmtree(folder)
    shutil.copytree(made().parent / "plain", folder)
    configure(folder, quantization_config={"quant_method": "fp8"})
    assert refusal(folder).endswith("none is fp8 in its files; allowed: experts plain or nf4")
    (folder / FILE).unlink()
    assert "read from safetensors files, and it has none" in refusal(folder)


def test_only_a_checkpoint_has_packed_experts(made, tmp_path):
    with pytest.raises(LoadError, match="which needs a quantised checkpoint's weights; allowed here: plain, nf4"):
        prepare_model(tiny_model("qwen3_moe"), experts="packed")
    shutil.copy(made().parent / "plain" / "config.json", tmp_path)
    with pytest.raises(LoadError) as told:
        load(str(tmp_path), experts="packed", random_weights=True)
    assert str(told.value).startswith(f"--model {tmp_path}: experts cannot stay packed: its weights are not quantised;")
    shutil.copy(made() / "config.json", tmp_path)
    with pytest.raises(LoadError, match="which needs a quantised checkpoint's weights"):
        load(str(tmp_path), experts="packed", random_weights=True)


@pytest.mark.parametrize("experts", ["plain", "nf4"])
def test_stacked_experts_that_transformers_would_misread_are_expanded_with_their_scales(made, experts):
    # findings/fp8_stacked_experts_unscaled.sh
    folder = made("all experts in a tensor, a scale for each")
    plain = expanded(folder)
    model = load_model(folder, dtype="float32", experts=experts)
    expected = prepare_model(plain, experts=experts)
    prompt = texts()[2]
    assert torch.equal(logits(model, prompt), logits(expected, prompt))


def test_a_model_that_fits_packed_alone_is_told_so(made, monkeypatch):
    packed = load_model(made(), dtype="bfloat16", experts="packed")
    room = weights_bytes(packed)
    monkeypatch.setattr("qllm.executor.model.loading.memory_bytes", lambda device: (2 * room, room))
    assert "0 GB of weights in bfloat16 (expanded from fp8)" in refusal(made(), "plain")
    assert refusal(made(), "plain").endswith("choose a smaller model or dtype, or experts packed, 0 GB")
    loaded = load(str(made()), dtype="bfloat16", experts="packed", random_weights=True)
    assert (loaded.weights_bytes, loaded.weights) == (room, "checkpoint")
    monkeypatch.setattr("qllm.executor.model.loading.memory_bytes", lambda device: (room // 2, room // 2))
    assert "GB of weights in bfloat16, experts packed, cpu has" in refusal(made())


# Preemption


@pytest.mark.parametrize("which", ["qwen3_moe", "gpt_oss"])
def test_a_pass_has_the_same_bits_suspended_at_each_point_while_another_runs(made, which):
    runner = Runner(load_model(made(which), experts="packed"), kv_blocks=64, block_size=4, splitter=finest)
    be, ls = lengths(2, seed=1, low=20, high=40)

    def start(prompt, first):
        return runner.begin([(Sequence(prompt, list(range(first, first + 12))), len(prompt))])

    with torch.inference_mode():
        alone, other = run_to_end(start(be, 0)), run_to_end(start(ls, 20))
        points, running = 0, start(be, 0)
        while running.advance() is not None:
            points += 1
        assert points > 2 * 8
        for at in range(points):
            running = start(be, 0)
            for _ in range(at + 1):
                running.advance()
            assert torch.equal(run_to_end(start(ls, 20)), other)
            assert torch.equal(run_to_end(running), alone)


def test_the_points_are_those_of_plain_experts(made):
    prompt = texts()[2]
    found = []
    for experts in ("plain", "packed"):
        runner = Runner(load_model(made(), dtype="float32", experts=experts), 9, 4, splitter=finest)
        points = []
        with torch.inference_mode():
            running = runner.begin([(Sequence(prompt, list(range(9))), len(prompt))])
            while (point := running.advance()) is not None:
                points.append(point)
        found.append(points)
    assert found[0] == found[1]


def test_an_abort_at_a_point_ends_that_request_alone(made):
    model = load_model(made(), dtype="float32", experts="packed")
    asked = [(p, 4, priority, 0.0) for p, priority in zip(lengths(3, seed=3), (1, 1, 0), strict=True)]
    plain = [request.tokens for request in serve(model, asked, limits=ROOMY)]
    count, victims = 0, []

    def abort(loop, p, execution):
        nonlocal count
        count += 1
        if count == 6:
            victims.append(execution.sequences[0])
            loop.abort(execution.sequences[0])

    found = serve(model, asked, limits=ROOMY, hook=abort)
    assert len(victims) == 1
    for request, tokens in zip(found, plain, strict=True):
        assert request in victims or request.tokens == tokens


# Where it is asked for


def test_engines_and_commands_take_the_option(made):
    with Engine.from_pretrained(made(), experts="packed", limits=ROOMY) as engine:
        assert len(engine.submit([5, 6], max_new_tokens=2, stop=()).result().tokens) == 2
    model = load_model(made(), experts="packed")
    assert model_facts(model)["dtype"] == "bfloat16, experts fp8"
    for command in ("run", "serve", "calibrate", "validate"):
        assert "packed" in CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output
