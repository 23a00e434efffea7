"""Attention of decode rows over the paged cache, by fixed parts of each row's keys.

Part p of a row covers keys `p * SPLIT` to `(p + 1) * SPLIT - 1`. Programs take parts of any rows, as they come, and
a second kernel merges a row's parts in their order: a row's bits follow from its own length and window alone.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from qllm.executor.gpu.launch import launch
from qllm.executor.gpu.paged import LOG2E, Logits, keys_in_tile, logits_of, padded, shared_memory, slots_of_keys
from qllm.executor.gpu.pass_inputs import SPLIT, STEP_KEYS, DecodeWork

GROUP_BLOCK = 16  # query heads of one KV head in one product: tensor cores take no fewer rows
TILE_BYTES = 32768  # of K and V in one step of a part; two steps are read ahead
MERGED = 8  # parts that the merge adds at a time: a warp holds so many results and reads ahead as many again
INTERPRETED_PROGRAMS = 3  # where there is no GPU


def scratch_for(max_parts: int, heads: int, value_width: int, device: torch.device | str) -> torch.Tensor:
    """Memory (float32) for the parts of one pass; all layers can share that of the largest `heads * value_width`."""
    return torch.empty(max_parts * heads * (value_width + 2), dtype=torch.float32, device=device)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: DecodeWork,
    out: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scratch: torch.Tensor,
) -> None:
    """Attention of q `[D, heads, Dk]` (any strides) at positions `length - 1`, into out `[D, heads, Dv]`.

    Args:
        q: Queries of one token each.
        keys: Store `[slots, kv_heads, Dk]`, contiguous within a head; the rows' own keys are written already.
        values: Store `[slots, kv_heads, Dv]`; where it is a view of the first Dv columns of `keys`, it is read as such.
        work: The rows. Padding rows get zeros.
        out: Result, of the dtype of q and of the stores.
        block_size: Slots of a block.
        scale: Factor of the products.
        window: Tokens seen, the token itself included; None: all.
        softcap: Logits x become tanh(x / softcap) * softcap.
        sinks: `[heads]`, one more logit a head, without a value.
        scratch: Of `scratch_for`, with room for the parts of `work`.
    """
    rows, heads, key_width = q.shape
    kv_heads, value_width = keys.shape[1], values.shape[-1]
    if rows == 0:
        return
    shared = values.data_ptr() == keys.data_ptr()
    # K in two parts: a tile as wide as a power of two for both would be twice as wide as latents are.
    main, rest = (value_width, key_width - value_width) if shared else (key_width, 0)
    tile_widths = (main, rest) if shared else (key_width, value_width)
    group = heads // kv_heads
    chunks = triton.cdiv(group, GROUP_BLOCK)
    logits = Logits(scale, softcap)
    capacity = scratch.numel() // (heads * (value_width + 2))
    partial, stats = scratch, scratch[capacity * heads * value_width :]
    launch(
        attend_parts,
        (programs_on(q.device, kv_heads * chunks), kv_heads * chunks),
        *(q, keys, values, work.blocks, work.first, work.length, work.first_part, work.parts),
        *(partial, stats, rows, *q.stride(), *keys.stride()[:2], *values.stride()[:2], logits.scale, logits.cap),
        HEADS=heads,
        GROUP=group,
        CHUNKS=chunks,
        GROUP_BLOCK=GROUP_BLOCK,
        KEY_WIDTH=main,
        REST_WIDTH=rest,
        VALUE_WIDTH=value_width,
        KEY_BLOCK=padded(main),
        REST_BLOCK=padded(rest),
        VALUE_BLOCK=padded(value_width),
        SHARED=shared,
        BLOCK_SIZE=block_size,
        BLOCK_N=keys_in_tile(*tile_widths, q.dtype, STEP_KEYS, TILE_BYTES),
        SPLIT=SPLIT,
        WINDOW=window or 0,
        CAPPED=logits.capped,
        num_warps=4,
        num_stages=2 if shared and q.dtype.itemsize > 2 else 3,  # of such wide tiles two are all that fit
    )
    launch(
        merge_parts,
        (rows, heads),
        partial,
        stats,
        work.length,
        work.first_part,
        out if sinks is None else sinks,
        out,
        *out.stride(),
        HEADS=heads,
        VALUE_WIDTH=value_width,
        VALUE_BLOCK=padded(value_width),
        SPLIT=SPLIT,
        PARTS=MERGED,
        WINDOW=window or 0,
        SINKS=sinks is not None,
        num_warps=1,
    )


@cache
def programs_on(device: torch.device, groups: int) -> int:
    """Programs for each of `groups` of query heads, so that all of them run at the same time on `device`."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    resident = max(1, min(3, shared_memory(device) // (2 * TILE_BYTES + 8192)))
    return -(-torch.cuda.get_device_properties(device).multi_processor_count * resident // groups)


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["blocks", "first", "length", "first_part", "parts"],
)
def attend_parts(
    q,
    keys,
    values,
    blocks,
    first,
    length,
    first_part,
    parts,
    partial,
    stats,
    rows,
    q_row,
    q_head,
    q_step,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Every so many-th part, for up to `GROUP_BLOCK` query heads of one KV head.

    Leaves in scratch the weighted sums of values, the largest logit, and the sum of the weights.
    """
    kv_head = tl.program_id(1).to(tl.int64) // CHUNKS
    in_group = tl.program_id(1) % CHUNKS * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
    head = kv_head * GROUP + in_group
    dk = tl.arange(0, KEY_BLOCK)
    dr = KEY_WIDTH + tl.arange(0, REST_BLOCK)
    dv = tl.arange(0, VALUE_BLOCK)
    keys += kv_head * keys_head
    values += kv_head * values_head
    total = tl.load(parts).to(tl.int32)
    for part in range(tl.program_id(0), total, tl.num_programs(0)):
        row = tl.full([], -1, tl.int32)  # the last that begins at this part or before
        for r in range(0, rows, 128):
            index = r + tl.arange(0, 128)
            begins = tl.load(first_part + index, mask=index < rows, other=total)
            row += tl.sum((begins <= part).to(tl.int32), 0)
        n = tl.load(length + row).to(tl.int32)
        low = (part - tl.load(first_part + row).to(tl.int32)) * SPLIT
        high = tl.minimum(low + SPLIT, n)
        seen_from = 0
        if WINDOW > 0:
            seen_from = tl.maximum(n - WINDOW, 0)
            low = tl.maximum(low, seen_from // BLOCK_N * BLOCK_N)
        if low < high:
            table = blocks + tl.load(first + row)
            queries = tl.load(
                q + row.to(tl.int64) * q_row + head[:, None] * q_head + dk[None, :] * q_step,
                mask=(in_group < GROUP)[:, None] & (dk < KEY_WIDTH)[None, :],
                other=0.0,
            )
            if REST_WIDTH > 0:
                queries_rest = tl.load(
                    q + row.to(tl.int64) * q_row + head[:, None] * q_head + dr[None, :] * q_step,
                    mask=(in_group < GROUP)[:, None] & (dr < KEY_WIDTH + REST_WIDTH)[None, :],
                    other=0.0,
                )
            biggest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
            weight = tl.zeros([GROUP_BLOCK], tl.float32)
            sums = tl.zeros([GROUP_BLOCK, VALUE_BLOCK], tl.float32)
            position = low + tl.arange(0, BLOCK_N)
            slot = slots_of_keys(table, position, position < high, BLOCK_SIZE)
            for _ in range(low, high, BLOCK_N):
                seen = position < high
                if WINDOW > 0:
                    seen = seen & (position >= seen_from)
                # The next step's slots are looked up here: keys are read ahead as soon as their slots are known.
                position_after = position + BLOCK_N
                slot_after = slots_of_keys(table, position_after, position_after < high, BLOCK_SIZE)
                k = tl.load(
                    keys + slot[:, None] * keys_slot + dk[None, :],
                    mask=seen[:, None] & (dk < KEY_WIDTH)[None, :],
                    other=0.0,
                )
                products = tl.dot(queries, tl.trans(k), input_precision="ieee")
                if REST_WIDTH > 0:
                    rest = tl.load(
                        keys + slot[:, None] * keys_slot + dr[None, :],
                        mask=seen[:, None] & (dr < KEY_WIDTH + REST_WIDTH)[None, :],
                        other=0.0,
                    )
                    products = tl.dot(queries_rest, tl.trans(rest), products, input_precision="ieee")
                x = logits_of(products, scale, cap, CAPPED)
                x = tl.where(seen[None, :], x, float("-inf"))
                now = tl.maximum(biggest, tl.max(x, 1))
                before = tl.exp2(biggest - now)
                p = tl.exp2(x - now[:, None])
                weight = weight * before + tl.sum(p, 1)
                if SHARED:
                    v = k
                else:
                    v = tl.load(
                        values + slot[:, None] * values_slot + dv[None, :],
                        mask=seen[:, None] & (dv < VALUE_WIDTH)[None, :],
                        other=0.0,
                    )
                sums = tl.dot(p.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
                biggest = now
                position, slot = position_after, slot_after
            place = part * HEADS + head  # int64, as head is
            tl.store(
                partial + place[:, None] * VALUE_WIDTH + dv[None, :],
                sums,
                mask=(in_group < GROUP)[:, None] & (dv < VALUE_WIDTH)[None, :],
            )
            tl.store(stats + place * 2, biggest, mask=in_group < GROUP)
            tl.store(stats + place * 2 + 1, weight, mask=in_group < GROUP)


@triton.jit(do_not_specialize_on_alignment=["stats", "length", "first_part", "sinks"])
def merge_parts(
    partial,
    stats,
    length,
    first_part,
    sinks,
    out,
    out_row,
    out_head,
    out_step,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One row and head: its parts, `PARTS` at a time from the first, then the sink."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, VALUE_BLOCK)
    n = tl.load(length + row).to(tl.int32)
    mine = tl.load(first_part + row)
    last = tl.cdiv(n, SPLIT)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(n - WINDOW, 0) // SPLIT
    biggest = float("-inf")
    weight = 0.0
    sums = tl.zeros([VALUE_BLOCK], tl.float32)
    for start in tl.range(low // PARTS * PARTS, last, PARTS, num_stages=3):
        part = start + tl.arange(0, PARTS)
        there = (part >= low) & (part < last)
        place = (mine + part) * HEADS + head
        x = tl.where(there, tl.load(stats + place * 2, mask=there, other=0.0), float("-inf"))
        weights = tl.load(stats + place * 2 + 1, mask=there, other=0.0)
        results = tl.load(
            partial + place[:, None] * VALUE_WIDTH + d[None, :],
            mask=there[:, None] & (d < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        now = tl.maximum(biggest, tl.max(x, 0))
        before = tl.exp2(biggest - now)
        share = tl.exp2(x - now)
        weight = weight * before + tl.sum(share * weights, 0)
        sums = sums * before + tl.sum(share[:, None] * results, 0)
        biggest = now
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        now = tl.maximum(biggest, sink)
        before = tl.exp2(biggest - now)
        weight = weight * before + tl.exp2(sink - now)
        sums = sums * before
    result = sums / tl.where(n > 0, weight, 1.0)  # zeros in a padding row
    tl.store(
        out + row * out_row + head * out_head + d * out_step, result.to(out.dtype.element_ty), mask=d < VALUE_WIDTH
    )
