"""Packed weights compute what the plain ones did."""

import pytest
import torch

from qllm.executor.cpu import linear as onednn
from qllm.executor.cpu import packed_matmul
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import tiny_model

pytestmark = pytest.mark.skipif(not onednn.can_pack(), reason="this PyTorch has no packed linear")


@pytest.mark.parametrize("rows", [0, 1, 3, 70])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_linear_is_linear(rows, transposed, with_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 48, generator=generator)
    weight = torch.randn(48, 80, generator=generator).t() if transposed else torch.randn(80, 48, generator=generator)
    bias = torch.randn(80, generator=generator) if with_bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert torch.allclose(onednn.linear(x, onednn.pack(weight), bias).double(), expected, atol=1e-4)


def test_plain_weights_are_freed_and_no_longer_compute_silently():
    model = prepare_model(tiny_model("mixtral", tie_word_embeddings=False))
    freed = [p for p in model.parameters() if p.untyped_storage().nbytes() == p.element_size()]
    assert {p.dim() for p in freed} == {2, 3}  # linear layers and experts
    assert all(p.isnan().all() for p in freed)


def test_a_weight_shared_with_the_embedding_is_kept():
    model = prepare_model(tiny_model("mixtral", tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.lm_head.weight.isnan().any()


def test_other_precisions_are_left_alone():
    model = tiny_model("mixtral").bfloat16()
    assert onednn.pack_model(model) == 0 or all(not p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("sizes", [[70], [50, 3, 49], [1, 0, 2], [53, 52, 51, 50]])
def test_without_the_kernel_experts_get_their_own_products_in_few_sizes(sizes, monkeypatch):
    monkeypatch.setattr(packed_matmul, "kernel", lambda: None)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 80, 48, generator=generator)
    packed = onednn.PackedWeights(weights)
    x, which, asked = torch.randn(sum(sizes), 48, generator=generator), [4, 0, 2, 1][: len(sizes)], []
    whole = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, *rest: asked.append(len(x)) or whole(x, *rest))
    expected = torch.cat([part @ weights[e].T for part, e in zip(x.split(sizes), which, strict=True)])
    assert torch.allclose(packed.products(x, which, sizes), expected, atol=1e-4)
    assert all(rows % onednn.EVEN_ROWS == 0 for rows in asked)
