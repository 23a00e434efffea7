"""The attention hook: packed sequences over a paged KV cache.

Decode rows are attended together (a padded gather per group of similar lengths), prefill chunks in query blocks with a
preemption point between groups of blocks. Grouped heads, sliding windows, sinks, logit soft-capping and different
widths of K and V (MLA) are handled here, once, for every model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from executor.batch import AttentionPlan, QueryBlock
from executor.cpu_attention import attend, suits
from executor.errors import ExecutorError, UnsupportedModelError
from executor.passes import RunningPass, current_pass

# Keywords that carry tensors which this hook may ignore: the batch itself says where sequences begin and end.
IGNORED = frozenset({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position"})


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query `[1, heads, T, Dk]`, key `[1, kv_heads, T, Dk]`, value `[1, kv_heads, T, Dv]`.

    Returns `[1, T, heads, Dv]`. `sliding_window` counts the tokens seen, the token itself included; `s_aux` (`[heads]`)
    are attention sinks. Raises UnsupportedModelError for an attention that is not plainly causal over the sequence's
    own KV.
    """
    running = current_pass()
    if running is None:
        raise ExecutorError("attention implementation 'qllm' called outside of a pass (use Runner.begin)")
    refuse(module, attention_mask, is_causal, kwargs)
    window = running.begin_layer(sliding_window)
    running.reach("attention", 0)
    layer, batch = running.layer, running.batch
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, D]
    batch.cache.write(layer, batch.slots, k, v)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[-1]))
    plan = batch.plan(window)
    kernel = Kernel(scale, softcap, s_aux)
    decode(running, layer, plan, q, out, kernel)
    k_first = v_first = None  # K and V of this pass, [kv_heads, T, D], copied once for all blocks that look at them
    for number, blocks in plan.groups:
        if number:
            running.reach("attention", number)
        for block in blocks:
            if kernel.plain and suits(block, k):
                if block.slots is None and k_first is None:
                    k_first, v_first = key[0].contiguous(), value[0].contiguous()
                prefill_by_parts(running, layer, block, q, k_first, v_first, out, scale)
            else:
                prefill(running, layer, block, q, k, v, out, kernel)
    return out.unsqueeze(0), None


def refuse(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    """Raise UnsupportedModelError where the layer asks for something that this hook would ignore."""
    name = type(module).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise UnsupportedModelError(f"{name}: attention is not causal")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name}: the model makes an attention mask of its own")
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and key not in IGNORED:
            raise UnsupportedModelError(f"{name}: attention keyword {key!r} (a tensor) is not supported")


class Kernel:
    """Scaled dot-product attention with this layer's scale, soft cap and sinks."""

    def __init__(self, scale: float, softcap: float | None, sinks: torch.Tensor | None):
        self.scale = scale
        self.softcap = softcap
        self.sinks = sinks
        self.plain = softcap is None and sinks is None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool = False
    ) -> torch.Tensor:
        """q `[B, kv_heads, group, rows, Dk]`, k and v `[B, kv_heads, L, D]`, mask bool `[rows, L]` or `[B, 1, 1, L]`.
        `causal` (no mask, rows = L, plain only): row i sees keys 0 to i.

        Returns `[B, kv_heads, group, rows, Dv]`.
        """
        batch, heads, group, rows, _ = q.shape
        if self.plain:
            if not causal and (
                mask is None or mask.dim() == 4
            ):  # one row a head, or all the same mask: a group's heads are rows too
                return F.scaled_dot_product_attention(q.flatten(2, 3), k, v, mask, scale=self.scale).view(
                    batch, heads, group, rows, v.shape[-1]
                )
            kv_shape = (batch, heads, group, *k.shape[2:3])
            out = F.scaled_dot_product_attention(
                q.flatten(1, 2),
                k.unsqueeze(2).expand(*kv_shape, k.shape[-1]).flatten(1, 2) if group > 1 else k,
                v.unsqueeze(2).expand(*kv_shape, v.shape[-1]).flatten(1, 2) if group > 1 else v,
                mask,
                is_causal=causal,
                scale=self.scale,
            )
            return out.view(batch, heads, group, rows, v.shape[-1])
        scores = torch.matmul(q.flatten(2, 3), k.transpose(2, 3)).view(batch, heads, group, rows, -1) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            seen = mask if mask.dim() == 2 else mask.unsqueeze(1)
            scores = scores.masked_fill(~seen, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.view(1, heads, group, 1, 1).to(scores.dtype).expand(batch, -1, -1, rows, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        if self.sinks is not None:
            weights = weights[..., :-1]
        return torch.matmul(weights.flatten(2, 3), v).view(batch, heads, group, rows, v.shape[-1])


def decode(
    running: RunningPass, layer: int, plan: AttentionPlan, q: torch.Tensor, out: torch.Tensor, kernel: Kernel
) -> None:
    """Rows of one token each, over their whole cached context."""
    for bucket in plan.decode:
        rows = bucket.last - bucket.first
        k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in running.batch.cache.read(layer, bucket.slots))
        queries = q[bucket.first : bucket.last].reshape(rows, k.shape[1], -1, 1, q.shape[-1])
        result = kernel(queries, k, v, bucket.mask)
        out[bucket.first : bucket.last] = result.reshape(rows, -1, v.shape[-1])


def prefill(
    running: RunningPass,
    layer: int,
    block: QueryBlock,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    kernel: Kernel,
) -> None:
    """One query block over the KV of its own sequence: this pass's rows, or gathered from the cache."""
    if block.slots is None:
        seen = slice(block.base, block.base + block.high - block.low)
        keys, values = k[seen], v[seen]
    else:
        keys, values = running.batch.cache.read(layer, block.slots)
    heads, rows = keys.shape[1], block.last - block.first
    queries = q[block.first : block.last].transpose(0, 1).unflatten(0, (1, heads, -1))
    causal = kernel.plain and block.square
    mask = None if causal else block.mask(q.device)
    result = kernel(queries, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], mask, causal)
    out[block.first : block.last] = result.reshape(-1, rows, v.shape[-1]).transpose(0, 1)


def prefill_by_parts(
    running: RunningPass,
    layer: int,
    block: QueryBlock,
    q: torch.Tensor,
    k_first: torch.Tensor | None,
    v_first: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
) -> None:
    """`prefill` by `executor.cpu_attention`; `k_first`, `v_first`: K and V of this pass's rows, `[kv_heads, T, D]`."""
    if k_first is not None and v_first is not None and block.slots is None:
        seen = slice(block.base, block.base + block.high - block.low)
        keys, values = k_first[:, seen], v_first[:, seen]
    else:
        assert block.slots is not None  # a block without them looks at this pass's rows
        keys, values = (t.transpose(0, 1).contiguous() for t in running.batch.cache.read(layer, block.slots))
    rows = slice(block.first, block.last)
    attend(block, q[rows], keys, values, out[rows], scale)
