from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qllm.executor.gpu.fused.norms import FORMS, fuse_norms, norm_form, rms_norm, unfuse_norms
from qllm.executor.testing import tiny_model

LLAMA, GPT_OSS, GEMMA = range(3)


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(1,), (5,), (1, 3), (2, 3, 4), (0, 3)]),
    width=st.sampled_from([2, 16, 50, 128]),
    form=st.sampled_from([LLAMA, GPT_OSS, GEMMA]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    view=st.sampled_from(["contiguous", "columns", "permuted", "spread", "heads"]),
)
def test_a_norm_is_that_of_its_formula_for_any_shape_and_strides(shape, width, form, dtype, view):
    x = tensor(*shape, 2 * width, dtype=dtype)
    x = {"columns": x[..., 1 : width + 1], "spread": x[..., ::2]}.get(view, x[..., :width].contiguous())
    if view == "permuted" and len(shape) > 1:
        x = x.transpose(0, -2)
    if view == "heads":  # some of what lies together for a token
        x = tensor(*shape[:-1], shape[-1] + 2, width, dtype=dtype)[..., : shape[-1], :]
    weight = tensor(width, dtype=dtype, seed=1)
    got, expected = rms_norm(x, weight, 1e-5, form), FORMS[form](x, weight, 1e-5)
    assert got.is_contiguous()
    step = torch.finfo(dtype).eps
    assert torch.allclose(got, expected, rtol=4 * step, atol=0)


@pytest.mark.parametrize(
    ("family", "dtype", "expected"),
    [
        ("qwen3_moe", torch.bfloat16, {LLAMA: 17}),
        ("qwen3_moe", torch.float32, {LLAMA: 17}),
        ("gpt_oss", torch.bfloat16, {GPT_OSS: 9}),
        ("gpt_oss", torch.float32, {LLAMA: 9}),  # the same, where nothing is rounded between
        ("minimax_m3_vl_text", torch.float16, {GEMMA: 17}),
        ("gemma4_text", torch.bfloat16, {GPT_OSS: 42, None: 8}),  # some have no weight
        ("cohere2_moe", torch.float32, {None: 5}),  # takes the mean off first
        ("phimoe", torch.float32, {None: 9}),
    ],
)
def test_the_formula_of_a_familys_norms_is_found_by_trying(family, dtype, expected):
    model = tiny_model(family).to(dtype)
    weights = [p.clone() for p in model.parameters()]
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    assert Counter(map(norm_form, norms)) == expected
    assert all(map(torch.equal, weights, model.parameters()))  # which the trial leaves alone


def test_a_norm_that_scales_before_it_divides_keeps_its_forward():
    model = tiny_model("muse_spark").bfloat16()
    kinds = {type(module).__name__: module for module in model.modules()}
    assert norm_form(kinds["MuseSparkTextInputScaledRMSNorm"]) is None
    assert norm_form(kinds["MuseSparkTextCenteredRMSNorm"]) is None  # rounds 1 + weight


class GroupedNorm(nn.Module):
    """Like an RMS norm, over the halves of a row."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x):
        halves = x.unflatten(-1, (2, 16))
        return self.weight * (halves * torch.rsqrt(halves.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)


class OtherEpsNorm(nn.Module):
    """Adds something else than its eps."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class PairNorm(nn.Module):
    """Takes two tensors."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x, y):
        return x, y


@pytest.mark.parametrize("kind", [GroupedNorm, OtherEpsNorm, PairNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_quite_a_norm_is_left_alone(kind, dtype):
    assert norm_form(kind().to(dtype)) is None


def test_a_norm_with_which_the_kernel_does_not_agree_is_left_alone(monkeypatch):
    norm = nn.Sequential(nn.RMSNorm(32, eps=1e-6))
    assert fuse_norms(norm, device_type="cpu") == 1
    unfuse_norms(norm)
    monkeypatch.setattr("qllm.executor.gpu.fused.norms.rms_norm", lambda *arguments: rms_norm(*arguments) * 1.001)
    assert fuse_norms(norm, device_type="cpu") == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m3_vl_text"])
def test_a_model_with_fused_norms_says_the_same_and_can_be_undone(family):
    model = tiny_model(family, num_hidden_layers=2)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
    assert fuse_norms(model) == 0  # not on a GPU
    n_norms = fuse_norms(model, device_type="cpu")
    assert n_norms == 9
    assert fuse_norms(model, device_type="cpu") == 0
    with torch.inference_mode():
        assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-4)
    model(input_ids=tokens).logits.sum().backward()  # with gradients it is the model's own
    norm = next(module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    assert norm.weight.grad is not None
    assert unfuse_norms(model) == n_norms
    assert unfuse_norms(model) == 0
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_on_a_gpu_are_fused_and_say_the_same(dtype):
    model = tiny_model("qwen3_moe").to(dtype).cuda()
    assert fuse_norms(model) == 17
    x = tensor(1, 33, 64, dtype=dtype).cuda()
    with torch.inference_mode():
        got, expected = model.model.norm(x).float(), FORMS[LLAMA](x, model.model.norm.weight, 1e-6).float()
    assert torch.allclose(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
