"""Prefill attention on CPUs in float32 by oneDNN's matrix products, where PyTorch has them.

PyTorch's own multiplies through MKL, half as fast on some processors (see `qllm.executor.cpu.linear`). Here a group's
query heads are rows of one product per KV head. Parts of a block's rows are small enough for their scores to stay in
the cache, and go over the keys that they see and no others.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from qllm.executor.model.attention_plan import QueryBlock

PART_ROWS = 512  # query rows times heads of a group in one product
MIN_ROWS = 16  # of a part, however many heads a group has
MIN_CELLS = 32768  # query rows times keys of a block; below, the calls cost more than the products gain


def suits(block: QueryBlock, key: torch.Tensor) -> bool:
    """Whether `attend` is the faster way: a function of the block alone, so that suspending changes no bits."""
    # Over its own keys alone a block is too small: PyTorch's kernel then leaves out half of the work.
    cells = (block.last - block.first) * (block.high - block.low)
    large = cells >= MIN_CELLS and not block.square
    return large and key.dtype is torch.float32 and key.device.type == "cpu" and available()


@cache
def available() -> bool:
    """Whether this PyTorch has oneDNN's linear for plain weights, and `attend` computes what it should."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    q, k, v = (torch.linspace(-2, 1 + i, 20 * 8).sin().view(1, 20, 8) for i in range(3))
    out = torch.empty(20, 1, 8)
    try:
        attend(QueryBlock(0, 20, 0, 0, 20, 0, None, None), q.transpose(0, 1), k, v, out, 0.3)
        return torch.allclose(
            out.transpose(0, 1), F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), atol=1e-5
        )
    except RuntimeError:
        return False


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`; `weight` `[N, K]` or its transpose must be contiguous, else oneDNN is 1,000 times slower."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def attend(
    block: QueryBlock, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float
) -> None:
    """Attention of the rows of `block` over its positions `low` to `high`, in float32 on the CPU, into `out`.

    q is `[rows, heads, Dk]`, k and v `[kv_heads, high - low, D]` and contiguous within a head, out `[rows, heads, Dv]`.
    """
    kv_heads, group = k.shape[0], q.shape[1] // k.shape[0]
    step = max(MIN_ROWS, PART_ROWS // group)
    for first in range(0, q.shape[0], step):
        part = q[first : first + step]
        rows, position = part.shape[0], block.position + first
        low = 0 if block.window is None else max(0, position - block.window + 1 - block.low)
        high = position + rows - block.low
        queries = (part * scale).unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
        hidden = torch.ones(rows, rows, dtype=torch.bool).triu(1)  # of the part's own keys, the last it sees
        gone = None
        if block.window is not None and position + rows - block.window > block.low + low:
            gone = torch.ones(rows, high - low, dtype=torch.bool).tril(position - block.window - block.low - low)
        for h in range(kv_heads):
            scores = product(queries[h], k[h, low:high])
            by_head = scores.view(group, rows, -1)
            by_head[:, :, -rows:].masked_fill_(hidden, float("-inf"))
            if gone is not None:
                by_head.masked_fill_(gone, float("-inf"))
            torch.softmax(scores, -1, out=scores)
            result = product(scores, v[h, low:high].t()).view(group, rows, -1)
            out[first : first + rows, h * group : (h + 1) * group] = result.transpose(0, 1)
