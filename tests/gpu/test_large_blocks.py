import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu import large_blocks
from qllm.executor.gpu.large_blocks import attend_block, suits


def wanted(q, k, v, scale):
    rows, length, group = len(q), len(k), q.shape[1] // k.shape[1]
    key, value = (t.float().repeat_interleave(group, 1) for t in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float(), key) * scale
    position = torch.arange(length, device=q.device)
    logits = logits.masked_fill(position > position[length - rows :, None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), value)


@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from([(1, 1), (2, 2), (1, 4)]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_block_is_what_plain_attention_gives_however_it_is_cut_for_cudnn(rows, before, heads, large):
    kv_heads, group = heads
    q = torch.randn(rows, kv_heads * group, 8)
    k, v = torch.randn(2, rows + before, kv_heads, 8) * (20 if large else 1)  # large: one side weighs nothing
    out = torch.full_like(q, float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_blocks, "REGULAR", 8)
        attend_block(q, k, v, out, 0.3)
    torch.testing.assert_close(out, wanted(q, k, v, 0.3), atol=1e-4, rtol=1e-4)


def test_half_precision_is_merged_in_float32():
    q, k, v = (torch.randn(n, 2, 64).bfloat16() for n in (50, 120, 120))
    out = torch.empty_like(q)
    attend_block(q, k, v, out, 0.125)
    torch.testing.assert_close(out.float(), wanted(q, k, v, 0.125), atol=2e-2, rtol=2e-2)


def test_only_equal_widths_of_eights_in_half_precision_suit():
    def tensor(width, dtype=torch.bfloat16):
        return torch.empty(1, 2, width, dtype=dtype)

    assert suits(*(tensor(128),) * 3)
    assert suits(*(tensor(256, torch.float16),) * 3)
    assert not suits(*(tensor(128, torch.float32),) * 3)
    assert not suits(*(tensor(100),) * 3)
    assert not suits(*(tensor(264),) * 3)
    assert not suits(tensor(192), tensor(192), tensor(128))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize(("rows", "before"), [(700, 1), (513, 2000), (2048, 0), (4100, 2050)])
def test_on_a_gpu_a_block_is_what_plain_attention_gives_whoever_computes_it(width, rows, before, monkeypatch):
    q, k, v = (
        torch.randn(n, heads, width, device="cuda").bfloat16() for n, heads in ((rows, 8), *[(rows + before, 2)] * 2)
    )
    expected = wanted(q, k, v, width**-0.5)
    for choice in (large_blocks.prefers_cudnn, lambda *call: False):
        monkeypatch.setattr(large_blocks, "prefers_cudnn", choice)
        out = torch.full_like(q, float("nan"))
        attend_block(q, k, v, out, width**-0.5)
        torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
