"""Experts in NF4: the levels, round trips, and the same tokens as the model whose weights were expanded again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import norm
from typer.testing import CliRunner

from qllm.cli import app
from qllm.executor.engine.engine import Engine
from qllm.executor.errors import LoadError, UnsupportedModelError
from qllm.executor.model.info import dtype_name, model_facts
from qllm.executor.model.loading import LoadedModel, load, load_model, prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split, whole
from qllm.executor.quantised.experts import weights_bytes
from qllm.executor.quantised.nf4 import BLOCK, LEVELS, Nf4Weights, nf4_bytes, quantise
from qllm.executor.testing import tiny_model
from qllm.experiment.engine_run import describe, load_target
from qllm.server.process.load import load_engine
from qllm.server.settings import ServerSettings
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import TimingError, Timings
from tests.engine_worlds import LAYERS, ROOMY, finest, prompts, serve
from tests.executor.test_families import generate, served
from tests.executor.test_families import prompts as texts

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
CPU = torch.device("cpu")


def expanded_again(model):
    """A copy of a plain model, its experts' weights rounded to NF4."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(module, "is_transposed") else ():
            weight = getattr(module, name, None)
            for one in () if weight is None else weight.data:
                plain = one.t() if module.is_transposed else one
                plain.copy_(Nf4Weights([plain], 1, CPU).expanded(0, plain.dtype))
    return model


# The format


def test_levels_are_those_of_the_paper():
    # appendix E: quantiles of the normal distribution at even steps of probability, zero among them, scaled to 1
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = norm.ppf(np.linspace(0.5, offset, 9)), norm.ppf(np.linspace(1 - offset, 0.5, 8))
    levels = np.sort(np.concatenate([below, above[1:]]))
    assert np.allclose(LEVELS, levels / levels.max(), atol=1e-6)


def naive(weight):
    """Each block for itself, each weight compared with each level."""
    out, levels = np.zeros_like(weight), np.array(LEVELS, dtype=np.float32)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], BLOCK):
            block = weight[row, start : start + BLOCK]
            most = np.abs(block).max()
            for i, value in enumerate(block):
                nearest = np.abs(levels * most - value).argmin()
                out[row, start + i] = levels[nearest] * most
    return out


weights = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@settings(max_examples=40, deadline=None)
@given(weights)
@example(np.zeros((2, 64), dtype=np.float32))
@example(np.full((1, 1), -3, dtype=np.float32))
@example(np.repeat(np.array(LEVELS, dtype=np.float32), 8)[None])
def test_a_round_trip_is_within_half_a_step_and_as_the_plain_way_says(weight):
    kept = Nf4Weights([torch.from_numpy(weight)], 1, CPU)
    found = kept.expanded(0, torch.float32).numpy()
    assert found.shape == weight.shape
    assert kept.nbytes == nf4_bytes(1, *weight.shape)
    steps = np.diff(LEVELS)
    for start in range(0, weight.shape[1], BLOCK):
        block, of = found[:, start : start + BLOCK], weight[:, start : start + BLOCK]
        most = np.abs(of).max(axis=1, keepdims=True)
        assert (np.abs(block - of) <= (steps.max() / 2 + 1e-6) * most).all()
        best = naive(of)
        # half-way between two levels either is as near
        assert (np.abs(np.abs(block - of) - np.abs(best - of)) <= 1e-6 * most).all()


def test_two_values_a_byte_the_first_in_the_higher_bits():
    codes, scales = quantise(torch.tensor([[4.0, 0.0, -4.0, 4 * LEVELS[2]]]))
    assert codes[0, :2].tolist() == [15 * 16 + 7, 0 * 16 + 2]
    assert scales.tolist() == [[4.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_weights_are_those_of_float32_rounded_once(dtype):
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = Nf4Weights([weight], 1, CPU)
    assert torch.equal(kept.expanded(0, dtype), kept.expanded(0, torch.float32).to(dtype))


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 18])
def test_bits_do_not_depend_on_how_many_weights_are_looked_at_together(at_once, monkeypatch):
    weight = torch.randn(33, 200, generator=torch.Generator().manual_seed(0))
    expected = Nf4Weights([weight], 1, CPU).expanded(0, torch.float32)
    monkeypatch.setattr("qllm.executor.quantised.weights.AT_ONCE", at_once)
    assert torch.equal(Nf4Weights([weight], 1, CPU).expanded(0, torch.float32), expected)


def test_products_are_those_of_the_expanded_weights():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(5, 48, 100, generator=generator)
    kept, sizes, which = Nf4Weights(plain, 5, CPU), [3, 1, 7], [4, 0, 3]
    x = torch.randn(sum(sizes), 100, generator=generator)
    parts = zip(x.split(sizes), which, strict=True)
    expected = torch.cat([part @ kept.expanded(e, torch.float32).T for part, e in parts])
    assert torch.allclose(kept.products(x, which, sizes), expected, atol=1e-4)


# Models


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_engine_gives_the_tokens_of_the_expanded_model(model_type):
    plain = tiny_model(model_type)
    expected = [generate(expanded_again(plain), prompt) for prompt in texts()]
    model = prepare_model(plain, experts="nf4")
    assert served(model, finest) == expected
    assert served(model, whole) == expected
    with Engine(model, limits=ROOMY) as engine:
        streams = [engine.submit(prompt, max_new_tokens=10, stop=()) for prompt in texts()]
        assert [stream.result().tokens for stream in streams] == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_the_expanded_model(model_type):
    plain = tiny_model(model_type)
    prompt = texts()[2]
    with torch.inference_mode():
        own, expected = (made(input_ids=torch.tensor([prompt])).logits for made in (plain, expanded_again(plain)))
        runner = Runner(prepare_model(plain, experts="nf4"), kv_blocks=9, block_size=4)
        logits = run_to_end(runner.begin([(Sequence(prompt, list(range(9))), len(prompt))]))
    error = (logits[0] - expected[0, -1]).norm() / expected[0, -1].norm()
    assert error < 1e-5
    assert (own - expected).norm() > 1e-3 * own.norm()  # rounding to 16 levels does show


def test_plain_weights_are_gone_and_what_is_left_is_counted():
    plain = tiny_model("gpt_oss", hidden_size=128, intermediate_size=192)
    before, told = weights_bytes(plain), weights_bytes(plain, "nf4")
    experts = [p for name, p in plain.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    held = sum(p.numel() for p in experts)
    assert {p.dim() for p in experts} == {3}
    model = prepare_model(plain, experts="nf4")
    assert not [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    kept = sum(module.nbytes for module in model.modules() if isinstance(module, Nf4Weights))
    assert kept <= 0.3 * 2 * held  # of 16 bits
    assert weights_bytes(model) == told == before - 4 * held + kept
    loaded = LoadedModel.of("one", model)
    assert loaded.weights_bytes == told
    assert model_facts(model)["dtype"] == dtype_name(model) == "float32, experts nf4"


def test_weights_of_any_size_are_padded():
    plain = tiny_model("mixtral", intermediate_size=41)
    plain.set_experts_implementation("eager")  # grouped products of PyTorch refuse such sizes
    expected = [generate(expanded_again(plain), prompt) for prompt in texts()]
    assert served(prepare_model(plain, experts="nf4"), finest) == expected


def test_bfloat16_is_computed_in_bfloat16():
    plain = tiny_model("qwen3_moe").bfloat16()
    model = prepare_model(plain, experts="nf4")
    assert dtype_name(model) == "bfloat16, experts nf4"
    with torch.inference_mode():
        running = Runner(model, kv_blocks=9, block_size=4).begin([(Sequence([5, 6, 7], [0]), 3)], Split(1, 1))
        assert run_to_end(running).dtype is torch.bfloat16


def test_a_checkpoint_and_random_weights_are_quantised_at_load(tmp_path):
    plain = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)
    plain.save_pretrained(tmp_path / "whole")
    expected = [generate(expanded_again(plain), prompt) for prompt in texts()]
    assert served(load_model(tmp_path / "whole", experts="nf4"), whole) == expected
    with Engine.from_pretrained(tmp_path / "whole", experts="nf4", limits=ROOMY) as engine:
        found = engine.submit(texts()[0], max_new_tokens=10, stop=()).result()
        assert found.tokens == expected[0]
    (tmp_path / "bare").mkdir()
    plain.config.save_pretrained(tmp_path / "bare")
    loaded = load(str(tmp_path / "bare"), experts="nf4", random_weights=True)
    assert dtype_name(loaded.model).endswith("experts nf4")
    assert loaded.weights_bytes == weights_bytes(loaded.model) == weights_bytes(plain, "nf4")


# What is refused


@pytest.mark.parametrize("experts", ["nf5", "int4", "", None])
def test_another_value_is_refused_in_a_line(experts, tmp_path):
    for call in (
        lambda: prepare_model(tiny_model("qwen3_moe"), experts=experts),
        lambda: load_model(tmp_path, experts=experts),
        lambda: load(str(tmp_path), experts=experts),
    ):
        with pytest.raises(LoadError) as told:
            call()
        assert str(told.value) == f"experts is {experts!r}; allowed: plain, nf4, packed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    model = tiny_model("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = value
    with pytest.raises(UnsupportedModelError, match="down_proj of experts cannot be nf4: weights are NaN or infinite"):
        prepare_model(model, experts="nf4")


def test_a_model_that_is_packed_already_is_refused():
    model = prepare_model(tiny_model("qwen3_moe"))
    if not hasattr(model.model.layers[1].mlp.experts, "_qllm_down_proj"):
        pytest.skip("this PyTorch packs nothing")
    with pytest.raises(UnsupportedModelError, match="packed already"):
        prepare_model(model, experts="nf4")


def test_a_model_too_large_for_its_device_is_refused(tmp_path, monkeypatch):
    plain = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)
    plain.save_pretrained(tmp_path)
    room = weights_bytes(plain, "nf4")
    monkeypatch.setattr("qllm.executor.model.loading.memory_bytes", lambda device: (room - 1, room - 1))
    with pytest.raises(LoadError, match="GB of weights in float32, experts nf4, cpu has"):
        load_model(tmp_path, experts="nf4")
    monkeypatch.setattr("qllm.executor.model.loading.memory_bytes", lambda device: (room, room))
    with pytest.raises(LoadError, match="GB of weights in float32, cpu has"):  # while they are read
        load_model(tmp_path, experts="nf4")


# Preemption


@pytest.fixture(scope="module")
def model(one_thread):
    return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=LAYERS), experts="nf4")


def test_a_pass_has_the_same_bits_suspended_at_each_point_while_another_runs(model):
    runner = Runner(model, kv_blocks=64, block_size=4, splitter=finest)
    be, ls = prompts(2, seed=1, low=20, high=40)

    def start(prompt, first):
        return runner.begin([(Sequence(prompt, list(range(first, first + 12))), len(prompt))])

    with torch.inference_mode():
        alone, other = run_to_end(start(be, 0)), run_to_end(start(ls, 20))
        points, running = 0, start(be, 0)
        while running.advance() is not None:
            points += 1
        assert points > LAYERS * 8
        for at in range(points):
            running = start(be, 0)
            for _ in range(at + 1):
                running.advance()
            assert torch.equal(run_to_end(start(ls, 20)), other)
            assert torch.equal(run_to_end(running), alone)


def test_an_abort_at_a_point_ends_that_request_alone(model):
    asked = [(p, 4, priority, 0.0) for p, priority in zip(prompts(3, seed=3), (1, 1, 0), strict=True)]
    plain = [request.tokens for request in serve(model, asked, limits=ROOMY)]
    for at in (0, 5, 17):
        count, victims = 0, []

        def abort(loop, p, execution, at=at, victims=victims):
            nonlocal count
            count += 1
            if count == at + 1:
                victims.append(execution.sequences[0])
                loop.abort(execution.sequences[0])

        found = serve(model, asked, limits=ROOMY, hook=abort)
        assert len(victims) == 1
        for request, tokens in zip(found, plain, strict=True):
            assert request in victims or request.tokens == tokens
        assert victims[0].finish_reason == "cancelled"


# Where it is asked for


def test_a_timing_trace_of_plain_weights_is_not_taken_for_nf4(model, tmp_path):
    kept = affine_timings(dtype=dtype_name(model))
    kept.save(tmp_path / "nf4.csv")
    Timings.load(tmp_path / "nf4.csv").check_matches(dtype=model_facts(model)["dtype"])
    with pytest.raises(TimingError, match="experts nf4"):
        affine_timings(dtype="float32").check_matches(dtype=model_facts(model)["dtype"])


def test_commands_and_servers_take_the_option():
    target = load_target(None, experts="nf4")
    assert describe(target).endswith("float32, experts nf4")
    assert target.weights_bytes < weights_bytes(load_target(None).model)
    given = {"device": "cpu", "dtype": "auto", "trust_remote_code": False, "graphs": "load"}
    engine, _ = load_engine(None, ServerSettings(), experts="nf4", **given)
    with engine:
        assert len(engine.submit([5, 6], max_new_tokens=2, stop=()).result().tokens) == 2
    with pytest.raises(LoadError, match="allowed: plain, nf4"):
        load_engine(None, ServerSettings(), experts="int4", **given)
    for command in ("run", "serve", "calibrate", "validate"):
        assert "--experts" in CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output
