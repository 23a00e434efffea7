"""Writes keys and values of a pass into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm.executor.gpu.launch import launch

ELEMENTS = 2048  # of K, and as many of V, in one program


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Store `key` and `value` (`[T, kv_heads, D]`, any strides) in `slots` (int64 `[T]`) of the two stores.

    Rows with a negative slot are padding: nothing of them is written. The stores are `[slots, kv_heads, D]`, contiguous
    within a head; the widths of K and V may differ.
    """
    rows, heads, key_width = key.shape
    value_width = value.shape[-1]
    key_block, value_block = triton.next_power_of_2(key_width), triton.next_power_of_2(value_width)
    block_heads = max(1, min(triton.next_power_of_2(heads), ELEMENTS // max(key_block, value_block)))
    if rows == 0:
        return
    launch(
        write_rows,
        (rows, triton.cdiv(heads, block_heads)),
        keys,
        values,
        slots,
        key,
        value,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        *key.stride(),
        *value.stride(),
        heads,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=value_block,
        HEADS=block_heads,
        num_warps=max(1, min(8, block_heads * max(key_block, value_block) // 256)),  # 8 elements a thread
    )


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_rows(
    keys,
    values,
    slots,
    key,
    value,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    key_row,
    key_head,
    key_step,
    value_row,
    value_head,
    value_step,
    heads,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One row, `HEADS` of its heads."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        d = tl.arange(0, KEY_BLOCK)[None, :]
        mask = (head < heads) & (d < KEY_WIDTH)
        new = tl.load(key + row * key_row + head.to(tl.int64) * key_head + d * key_step, mask=mask)
        tl.store(keys + slot * keys_slot + head * keys_head + d, new, mask=mask)
        d = tl.arange(0, VALUE_BLOCK)[None, :]
        mask = (head < heads) & (d < VALUE_WIDTH)
        new = tl.load(value + row * value_row + head.to(tl.int64) * value_head + d * value_step, mask=mask)
        tl.store(values + slot * values_slot + head * values_head + d, new, mask=mask)
