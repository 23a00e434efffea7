from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qllm.executor.gpu.fused.gate import is_plain_gate, silu_and_mul
from qllm.executor.gpu.fused.rotary import FusedRotary, _namespaces, _plain, fuse_rotary, rotate, unfuse_rotary
from qllm.executor.testing import tiny_model


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 2),
    steps=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (17, 9)]),
    width=st.sampled_from([8, 20, 64]),
    form=st.sampled_from(["whole", "part", "halves"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    transposed=st.booleans(),
    shared=st.booleans(),
)
def test_queries_and_keys_turn_bit_for_bit_as_in_plain_torch(
    batch, steps, heads, width, form, dtype, transposed, shared
):
    q, k = (tensor(batch, steps, n, width, dtype=dtype, seed=n).transpose(1, 2) for n in heads)
    if not transposed:
        q, k = q.contiguous(), k.contiguous()
    turned = {"whole": width, "part": width // 4 * 2, "halves": width // 2}[form]
    cos, sin = (tensor(1 if shared else batch, steps, turned, dtype=dtype, seed=i) for i in (5, 6))
    for got, expected in zip(rotate(q, k, cos, sin, form), _plain(q, k, cos, sin, form), strict=True):
        assert torch.equal(got, expected)


@pytest.fixture(autouse=True)
def nothing_stays_fused() -> Iterator[None]:
    yield
    assert not isinstance(modeling_qwen3_moe.apply_rotary_pos_emb, FusedRotary)


@pytest.mark.parametrize(
    ("family", "dtype", "forms"),
    [
        ("qwen3_moe", torch.float16, {"whole"}),
        ("glm4_moe", torch.float16, {"whole", "part"}),
        ("gpt_oss", torch.float16, {"halves"}),
        ("cohere2_moe", torch.float16, set()),  # turns in float32
        ("gemma4_text", torch.float32, set()),  # one tensor at a time
        ("ernie4_5_moe", torch.float32, set()),  # pairs of neighbours
    ],
)
def test_what_a_familys_function_computes_is_found_by_trying(family, dtype, forms):
    model = tiny_model(family).to(dtype)
    assert fuse_rotary(model) == 0  # not on a GPU
    try:
        assert fuse_rotary(model, device_type="cpu") == bool(forms)
        assert fuse_rotary(model, device_type="cpu") == bool(forms)  # once more is no more
        (module,) = _namespaces(model)
        function = module.apply_rotary_pos_emb
        assert {form for form, _, _ in function.known} == forms if forms else not isinstance(function, FusedRotary)
    finally:
        assert unfuse_rotary(model) == bool(forms)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_a_model_with_fused_positions_says_the_same(family):
    model, tokens = tiny_model(family), torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        try:
            fuse_rotary(model, device_type="cpu")
            assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-5)
        finally:
            unfuse_rotary(model)


def test_what_was_not_tried_goes_to_the_models_own_function():
    calls = []

    def own(q, k, cos, sin, unsqueeze_dim=1):
        calls.append(q.dtype)
        return modeling_qwen3_moe.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    rotary = FusedRotary(own)
    rotary.try_out(torch.float32, torch.device("cpu"))
    q, cos = tensor(1, 2, 3, 8), tensor(1, 3, 8)
    calls.clear()
    with torch.inference_mode():
        rotary(q, q, cos, cos)
        assert not calls
        rotary(q.half(), q.half(), cos.half(), cos.half())  # another type
        rotary(q.transpose(1, 2), q.transpose(1, 2), cos, cos, unsqueeze_dim=2)
        rotary(q.mT.contiguous().mT, q, cos, cos)  # the last stride is not 1
        rotary(q, q, cos.half(), cos.half())  # types that differ
    rotary(q, q, cos, cos)  # gradients
    assert len(calls) == 5


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(0, 5),
    width=st.sampled_from([1, 24, 64, 1030]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    spread=st.booleans(),
)
def test_the_gate_is_silu_of_one_half_times_the_other(rows, width, dtype, spread):
    gate_up = tensor(rows, 4 * width, dtype=dtype)
    gate_up = gate_up[:, ::2] if spread else gate_up[:, : 2 * width]
    gate, up = gate_up.chunk(2, -1)
    step = torch.finfo(dtype).eps
    assert torch.allclose(silu_and_mul(gate_up), F.silu(gate) * up, rtol=4 * step, atol=0)


def test_the_gate_rounds_as_often_as_plain_torch():
    gate_up = tensor(20, 200, dtype=torch.float16)
    gate, up = gate_up.chunk(2, -1)
    assert (silu_and_mul(gate_up) == F.silu(gate) * up).float().mean() > 0.99


def test_the_gate_leaves_out_rows_that_no_expert_has():
    gate_up = tensor(6, 8)
    gate_up[4:] = 3e38
    got = silu_and_mul(gate_up, torch.tensor([1, 1, 4], dtype=torch.int32))
    assert torch.allclose(got[:4], F.silu(gate_up[:4, :4]) * gate_up[:4, 4:], atol=1e-6)


def test_a_gate_is_plain_where_it_is_transformers_own_with_silu():
    def experts(model):
        return next(module for module in model.modules() if hasattr(module, "_apply_gate"))

    plain = experts(tiny_model("qwen3_moe"))
    assert is_plain_gate(plain)
    plain.act_fn = nn.GELU()
    assert not is_plain_gate(plain)
    assert not is_plain_gate(experts(tiny_model("gpt_oss")))  # its own gate
    assert not is_plain_gate(nn.Linear(1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_turns_and_gates_like_plain_torch(dtype):
    model = tiny_model("qwen3_moe").to(dtype).cuda()
    try:
        assert fuse_rotary(model) == 1
    finally:
        unfuse_rotary(model)
    q, k = (tensor(1, 33, n, 128, dtype=dtype).cuda().transpose(1, 2) for n in (32, 4))
    cos, sin = tensor(1, 33, 128, dtype=dtype).cuda(), tensor(1, 33, 128, dtype=dtype, seed=1).cuda()
    for got, expected in zip(rotate(q, k, cos, sin), _plain(q, k, cos, sin, "whole"), strict=True):
        assert torch.equal(got, expected)
    gate_up = tensor(33, 1536, dtype=dtype).cuda()
    gate, up = gate_up.chunk(2, -1)
    assert torch.allclose(silu_and_mul(gate_up), F.silu(gate) * up, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
