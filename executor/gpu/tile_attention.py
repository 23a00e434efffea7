"""Attention of prompts' chunks over their paged context, in tiles of rows.

A row's bits do not depend on how its prompt was cut into chunks and tiles, nor on its place in a tile: keys are taken
in blocks at fixed positions, blocks that a row does not see change nothing of it, and a product's rows do not mix.
Decode rows and large blocks add in another order: a token computed there may have other last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm.executor.gpu.launch import launch
from qllm.executor.gpu.paged import LOG2E, Logits, keys_in_tile, logits_of, padded, shared_memory, slots_of_keys
from qllm.executor.gpu.pass_inputs import TILE_ROWS, TileWork

TILE_BYTES = 32768  # of K and V in one step
RESERVED_BYTES = 1024  # of shared memory, in each program


def tile_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: TileWork,
    out: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Causal attention of the tiles' rows of q `[R, heads, Dk]` (any strides) into those of out `[R, heads, Dv]`.

    Row i of a tile sees the keys at positions 0 to `position + i`, its own included, or the last `window` of them. The
    other rows of `out` are left as they are. Arguments as of `decode_attention`.
    """
    _, heads, key_width = q.shape
    value_width = values.shape[-1]
    tiles = work.rows.shape[0]
    if tiles == 0:
        return
    logits = Logits(scale, softcap)
    # Products of float32 are sums of ordinary instructions, whose operands lie in registers: fewer rows a program.
    rows = TILE_ROWS if q.dtype.itemsize == 2 else 16
    block_n = keys_in_tile(key_width, value_width, q.dtype, 64, TILE_BYTES)
    step_bytes = block_n * (padded(key_width) + padded(value_width)) * q.dtype.itemsize
    row_bytes = rows * padded(key_width) * q.dtype.itemsize
    # Two steps are read ahead where two programs then still fit on a multiprocessor.
    two_programs = 2 * (row_bytes + 3 * step_bytes + RESERVED_BYTES)
    launch(
        attend_tile,
        (heads, tiles * (TILE_ROWS // rows)),
        q,
        keys,
        values,
        work.blocks,
        work.row,
        work.rows,
        work.position,
        work.first,
        q if sinks is None else sinks,
        out,
        *q.stride(),
        *out.stride(),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        logits.scale,
        logits.cap,
        GROUP=heads // keys.shape[1],
        ROWS=rows,
        PROGRAMS=TILE_ROWS // rows,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        KEY_BLOCK=padded(key_width),
        VALUE_BLOCK=padded(value_width),
        BLOCK_SIZE=block_size,
        BLOCK_N=block_n,
        WINDOW=window or 0,
        CAPPED=logits.capped,
        SINKS=sinks is not None,
        num_warps=8 if padded(value_width) > 128 else 4,
        num_stages=3 if two_programs <= shared_memory(q.device) else 2,
    )


@triton.jit(do_not_specialize_on_alignment=["blocks", "row", "rows", "position", "first", "sinks"])
def attend_tile(
    q,
    keys,
    values,
    blocks,
    row,
    rows,
    position,
    first,
    sinks,
    out,
    q_row,
    q_head,
    q_step,
    out_row,
    out_head,
    out_step,
    keys_slot,
    keys_head,
    values_slot,
    values_head,
    scale,
    cap,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """`ROWS` rows of one tile, for one query head; a sequence's last tiles, which see the most keys, begin first."""
    head = tl.program_id(0).to(tl.int64)
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    tile = program // PROGRAMS
    skipped = program % PROGRAMS * ROWS
    n = tl.minimum(tl.load(rows + tile).to(tl.int32) - skipped, ROWS)
    if n > 0:
        begin = tl.load(position + tile).to(tl.int32) + skipped
        table = blocks + tl.load(first + tile)
        packed = tl.load(row + tile) + skipped
        i = tl.arange(0, ROWS)
        dk = tl.arange(0, KEY_BLOCK)
        dv = tl.arange(0, VALUE_BLOCK)
        keys += head // GROUP * keys_head
        values += head // GROUP * values_head
        queries = tl.load(
            q + head * q_head + (packed + i)[:, None] * q_row + dk[None, :] * q_step,
            mask=(i < n)[:, None] & (dk < KEY_WIDTH)[None, :],
            other=0.0,
        )
        own = begin + i  # each row's own position
        high = begin + n
        low = 0
        if WINDOW > 0:
            low = tl.maximum(begin - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        biggest = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        at = low + tl.arange(0, BLOCK_N)
        slot = slots_of_keys(table, at, at < high, BLOCK_SIZE)
        for _ in range(low, high, BLOCK_N):
            there = at < high
            if WINDOW > 0:
                there = there & (at > begin - WINDOW)  # nobody's keys may be NaN, and 0 * NaN is NaN
            # The next step's slots are looked up here: keys are read ahead as soon as their slots are known.
            at_after = at + BLOCK_N
            slot_after = slots_of_keys(table, at_after, at_after < high, BLOCK_SIZE)
            k = tl.load(
                keys + slot[:, None] * keys_slot + dk[None, :],
                mask=there[:, None] & (dk < KEY_WIDTH)[None, :],
                other=0.0,
            )
            x = logits_of(tl.dot(queries, tl.trans(k), input_precision="ieee"), scale, cap, CAPPED)
            seen = at[None, :] <= own[:, None]
            if WINDOW > 0:
                seen = seen & (at[None, :] > own[:, None] - WINDOW)
            x = tl.where(seen, x, float("-inf"))
            biggest_now = tl.maximum(biggest, tl.max(x, 1))
            # A row that has seen no key yet has no maximum; its weights are to be 0, not NaN.
            level = tl.where(biggest_now == float("-inf"), 0.0, biggest_now)
            before = tl.exp2(biggest - level)
            p = tl.exp2(x - level[:, None])
            weight = weight * before + tl.sum(p, 1)
            v = tl.load(
                values + slot[:, None] * values_slot + dv[None, :],
                mask=there[:, None] & (dv < VALUE_WIDTH)[None, :],
                other=0.0,
            )
            sums = tl.dot(p.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
            biggest = biggest_now
            at, slot = at_after, slot_after
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
            level = tl.maximum(biggest, sink)
            before = tl.exp2(biggest - level)
            weight = weight * before + tl.exp2(sink - level)
            sums = sums * before[:, None]
        result = sums / tl.where(i < n, weight, 1.0)[:, None]
        tl.store(
            out + head * out_head + (packed + i)[:, None] * out_row + dv[None, :] * out_step,
            result.to(out.dtype.element_ty),
            mask=(i < n)[:, None] & (dv < VALUE_WIDTH)[None, :],
        )
