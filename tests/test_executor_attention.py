"""The oneDNN attention of prefills gives what scaled_dot_product_attention gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from executor.batch import QueryBlock
from executor.cpu_attention import MIN_KEYS, MIN_ROWS, attend, available, suits


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN linear")
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize(
    ("rows", "context", "heads", "kv_heads", "widths"), [(300, 0, 4, 2, (16, 16)), (70, 230, 6, 1, (24, 16))]
)
def test_block_of_a_prompt_equals_sdpa(rows, context, heads, kv_heads, widths, window):
    torch.manual_seed(0)
    total = rows + context
    low = 0 if window is None else max(0, context - window + 1)
    q = torch.randn(rows, heads, widths[0])
    k, v = (torch.randn(kv_heads, total, d) for d in widths)
    block = QueryBlock(0, rows, context, low, total, 0, None, window)
    out = torch.full((rows, heads, widths[1]), float("nan"))
    attend(block, q, k[:, low:].contiguous(), v[:, low:].contiguous(), out, 0.2)
    at, seen = torch.arange(context, total)[:, None], torch.arange(total)[None, :]
    mask = (seen <= at) & (seen > at - (window or total + 1))
    group = heads // kv_heads
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), mask, scale=0.2
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_only_large_float32_blocks_on_cpus_take_it():
    block = QueryBlock(0, MIN_ROWS, 0, 0, MIN_KEYS, 0, None, None)
    assert suits(block, torch.zeros(1)) == available()
    assert not suits(block, torch.zeros(1, dtype=torch.bfloat16))
    assert not suits(QueryBlock(0, MIN_ROWS - 1, 0, 0, MIN_KEYS, 0, None, None), torch.zeros(1))
    assert not suits(QueryBlock(0, MIN_ROWS, 0, 0, MIN_KEYS - 1, 0, None, None), torch.zeros(1))
