"""The oneDNN attention of prefills gives what scaled_dot_product_attention gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qllm.executor.model import attention_cpu as cpu_attention
from qllm.executor.model.attention_cpu import MIN_CELLS, attend, available, suits
from qllm.executor.model.attention_plan import QueryBlock
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.testing import tiny_model
from tests.engine_worlds import finest


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
    rows = 64
    block = QueryBlock(0, rows, 0, 0, MIN_CELLS // rows, 0, None, None)
    assert suits(block, torch.zeros(1)) == available()
    assert not suits(block, torch.zeros(1, dtype=torch.bfloat16))
    assert not suits(QueryBlock(0, rows - 1, 0, 0, MIN_CELLS // rows, 0, None, None), torch.zeros(1))


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN linear")
def test_a_suspended_prefill_gives_the_same_bits_on_this_path_too(one_thread, monkeypatch):
    """As in test_passes, with every block on this path: another pass runs at each point, chunks included."""
    model = prepare_model(tiny_model("qwen3_moe"))

    def serve(foreign: bool) -> list[torch.Tensor]:
        runner = Runner(model, 64, 16, finest)
        torch.manual_seed(1)
        tokens = torch.randint(2, 60, (3, 60)).tolist()
        sequences = [Sequence(t, list(range(4 * i, 4 * i + 4))) for i, t in enumerate(tokens)]
        logits = []
        for n in (40, 20):  # the second chunk looks at the KV cache
            running = runner.begin([(s, n) for s in sequences[:2]])
            while running.advance() is not None:
                if foreign:
                    sequences[2].computed = 0
                    run_to_end(runner.begin([(sequences[2], 50)]))
            logits.append(running.logits.clone())
        return logits

    with torch.inference_mode():
        plain = serve(foreign=False)
        monkeypatch.setattr(cpu_attention, "MIN_CELLS", 0)
        alone, disturbed = serve(foreign=False), serve(foreign=True)
    for a, b, c in zip(alone, disturbed, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)
