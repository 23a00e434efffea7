"""The attention hook: packed sequences over a paged KV cache.

Decode rows are attended together (a padded gather per group of similar lengths), prefill chunks in query blocks with
preemption points between. Grouped heads, windows, sinks and soft caps are handled here for every model. Where attention
is latent (MLA), rows that decode attend to latents, and those of prompts to keys and values expanded from them. On a
GPU `qllm.executor.gpu.packed_attention` does the same by kernels that read the paged cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from qllm.executor.errors import ExecutorError, UnsupportedModelError
from qllm.executor.latent.latents import Latents
from qllm.executor.model.attention_cpu import attend as attend_by_parts
from qllm.executor.model.attention_cpu import suits
from qllm.executor.model.attention_plan import AttentionPlan, QueryBlock
from qllm.executor.model.passes import current_pass

# Keywords that carry tensors which this hook may ignore: the batch itself says where sequences begin and end.
IGNORED = frozenset({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position"})
#: What the cache keeps in slots (int64 `[n]`), each `[n, kv_heads, width]`.
Read = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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
    """Attention of one layer inside a pass; raises UnsupportedModelError for any that is not plainly causal.

    query `[1, heads, T, Dk]`, key and value `[1, kv_heads, T, D]`, sinks s_aux `[heads]`; out `[1, T, heads, Dv]`.
    `sliding_window` counts tokens seen, the token itself included. ExecutorError outside of a pass.
    """
    running = current_pass()
    if running is None:
        raise ExecutorError("attention implementation 'qllm' called outside of a pass (use Runner.begin)")
    refuse(module, attention_mask, is_causal, kwargs)
    latents, running.latents = running.latents, None
    window = running.begin_layer(sliding_window)
    running.reach("attention", 0)
    layer, batch = running.attention_layer, running.batch
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, D]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    make = q.new_zeros if batch.has_idle_rows else q.new_empty
    out = make((q.shape[0], q.shape[1], v.shape[-1]))
    kept = (k, v) if latents is None else latents.kept
    if batch.inputs is not None:
        from qllm.executor.gpu.packed_attention import Layer, attend  # Triton, which is there with a GPU only

        in_rings, stores = batch.cache.in_rings(window), batch.cache.layer(layer, *kept, window=window)
        tables, ring = batch.inputs.tables(in_rings=in_rings), batch.cache.ring_tokens if in_rings else 0
        form = Layer(*stores, batch.cache.block_size, scale, window, softcap, s_aux, tables, ring)
        attend(q, k, v, out, form, batch.inputs, batch.prompt_parts, partial(running.reach, "attention"), latents)
        return out.unsqueeze(0), None
    plan = running.plan(window)
    kernel = Kernel(scale, softcap, s_aux)
    read: Read = partial(batch.cache.read, layer)
    keys_of = Keys(key[0], value[0], read, latents, plan.contexts())
    batch.write(layer, *kept, window)
    if latents is None:
        decode(plan, q, out, kernel, read)
    else:
        n = batch.n_decode
        sums = q.new_empty((n, q.shape[1], latents.form.latent_width))
        decode(plan, latents.form.queries(q[:n]), sums, kernel, lambda slots: latents.as_kv(read(slots)[0]))
        out[:n] = latents.form.results(sums)
    for number, blocks in plan.block_groups:
        if number:
            running.reach("attention", number)
        for block in blocks:
            by_parts = kernel.plain and suits(block, key)
            k_seen, v_seen = keys_of(block, by_parts)
            rows = slice(block.first, block.last)
            if by_parts:
                attend_by_parts(block, q[rows], k_seen, v_seen, out[rows], scale)
            else:
                prefill(block, q[rows], k_seen, v_seen, out[rows], kernel)
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
        """Attention of query heads, of which `group` share one KV head, to `[B, kv_heads, group, rows, Dv]`.

        q is `[B, kv_heads, group, rows, Dk]`, k and v `[B, kv_heads, L, D]`. The mask, `[rows, L]` or `[B, 1, 1, L]`,
        is True where a row may look. `causal` (row i sees keys 0 to i) needs no mask, rows = L and a plain kernel.
        """
        batch, heads, group, rows, _ = q.shape
        if self.plain:
            # One row a head, or the same mask for all: a group's heads are rows too.
            if not causal and (mask is None or mask.dim() == 4):
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


def decode(plan: AttentionPlan, q: torch.Tensor, out: torch.Tensor, kernel: Kernel, read: Read) -> None:
    """Rows of one token each, over their whole cached context."""
    for bucket in plan.decode:
        rows = bucket.last - bucket.first
        k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in read(bucket.slots))
        queries = q[bucket.first : bucket.last].reshape(rows, k.shape[1], -1, 1, q.shape[-1])
        result = kernel(queries, k, v, bucket.mask)
        out[bucket.first : bucket.last] = result.reshape(rows, -1, v.shape[-1])


class Keys:
    """K and V of query blocks: the pass's own rows `[kv_heads, T, D]`, or a chunk's, gathered once and then kept.

    Where attention is latent, the pass's own rows begin with row `latents.first`, and a chunk's are expanded. Of layers
    that keep a window, the `contexts` (slots) of chunks are read at once: what is written next may overwrite them.
    """

    holds_activations = True

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        read: Read,
        latents: Latents | None,
        contexts: Iterable[torch.Tensor] = (),
    ):
        self._own = (key, value)
        self._read, self._latents = read, latents
        self._slots: torch.Tensor | None = None
        self._gathered = self._own
        self._contexts = tuple((slots, *read(slots)) for slots in contexts)

    def __call__(self, block: QueryBlock, contiguous: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each `[kv_heads, high - low, D]`; contiguous within a head where asked for."""
        seen = block.seen
        if block.slots is None:
            if contiguous:
                self._own = (self._own[0].contiguous(), self._own[1].contiguous())
            k, v = self._own
            if self._latents is not None:
                seen = slice(seen.start - self._latents.first, seen.stop - self._latents.first)
        else:
            if block.slots is not self._slots:
                self._slots, self._gathered = block.slots, self._of_chunk(block.slots, block.own)
            k, v = self._gathered
        return k[:, seen], v[:, seen]

    def _of_chunk(self, slots: torch.Tensor, own: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of what a chunk sees, each `[kv_heads, L, D]`."""
        if own is None:
            found = self._read(slots)
            if self._latents is not None:
                found = self._latents.expanded(found[0])
            k, v = (t.transpose(0, 1).contiguous() for t in found)
            return k, v
        context = next(found for at, *found in self._contexts if at is slots)
        k, v = (torch.cat([t.transpose(0, 1), new[:, own]], 1) for t, new in zip(context, self._own, strict=True))
        return k, v


def prefill(
    block: QueryBlock, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, kernel: Kernel
) -> None:
    """One query block: q `[rows, heads, Dk]` over k and v `[kv_heads, high - low, D]` into out `[rows, heads, Dv]`."""
    queries = q.transpose(0, 1).unflatten(0, (1, k.shape[0], -1))
    causal = kernel.plain and block.square
    mask = None if causal else block.mask(q.device)
    result = kernel(queries, k[None], v[None], mask, causal)
    out.copy_(result.reshape(-1, q.shape[0], v.shape[-1]).transpose(0, 1))
