"""Rows of hidden states in the order of their experts, and the weighted sum of what the experts made of them.

An assignment is one of a token's k choices: number `t * k + j` is the `j`-th expert of token `t`. The host never learns
how many rows an expert has: where each expert's rows end stays on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qllm.executor.gpu.launch import launch

#: Up to so many assignments, each one's rank is counted over all others in one launch; beyond, torch.sort is faster.
MAX_COUNTED = 8192
_RANKS = 16  # ranks that one program counts
_CHUNK = 512  # assignments that it looks at together


class SortedRows(NamedTuple):
    """The `S = T * k` assignments, sorted by expert; those that belong to no expert held here come last."""

    token: torch.Tensor  #: int64 [S]: which row of the hidden states each sorted row is
    place: torch.Tensor  #: int64 [S]: where each assignment stands in the sorted order
    offsets: torch.Tensor  #: int32 [E]: where each expert's rows end


def sort_rows(top_k_index: torch.Tensor, n_experts: int, slots: torch.Tensor | None = None) -> SortedRows:
    """Sort assignments by expert, equal ones in the order of their numbers.

    Args:
        top_k_index: integer [T, k], the experts of each token. Others than 0 to `n_experts` - 1 are held elsewhere.
        n_experts: experts held here.
        slots: int64 [T], negative for a row that only pads the batch; its assignments belong to no expert.
    """
    tokens, top_k = top_k_index.shape
    ids, total = top_k_index.reshape(-1), tokens * top_k
    if total > MAX_COUNTED:
        return _sort_many(ids, top_k, n_experts, slots)
    token, place = ids.new_empty(total, dtype=torch.int64), ids.new_empty(total, dtype=torch.int64)
    offsets = ids.new_empty(n_experts, dtype=torch.int32)
    chunk = min(_CHUNK, max(16, triton.next_power_of_2(total)))
    launch(
        _count_ranks,
        (triton.cdiv(total, _RANKS) + triton.cdiv(n_experts, _RANKS),),
        ids,
        slots if slots is not None else ids,
        token,
        place,
        offsets,
        total,
        n_experts,
        TOP_K=top_k,
        HAS_SLOTS=slots is not None,
        RANKS=_RANKS,
        CHUNK=chunk,
        num_warps=8 if chunk > 256 else 4,
    )
    return SortedRows(token, place, offsets)


def _sort_many(ids: torch.Tensor, top_k: int, n_experts: int, slots: torch.Tensor | None) -> SortedRows:
    foreign = (ids < 0) | (ids >= n_experts)
    if slots is not None:
        foreign = (foreign.view(-1, top_k) | (slots < 0)[:, None]).view(-1)
    # short keys: a radix sort's time goes with their bits
    keys = ids.masked_fill(foreign, n_experts).to(torch.int16 if n_experts < 2**15 else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(ids), device=ids.device))
    experts = torch.arange(n_experts, device=ids.device, dtype=keys.dtype)
    return SortedRows(order // top_k, place, torch.searchsorted(keys, experts, right=True, out_int32=True))


def combine(outputs: torch.Tensor, rows: SortedRows, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each token's weighted sum `[T, H]` in `dtype`, added up in float32 in the order of its top-k.

    A product is rounded to the type that `outputs` and `weights` promote to.

    Args:
        outputs: [S, H], of the sorted rows. Those past the last offset count as zero, whatever lies there.
        rows: how they were sorted.
        weights: [T, k].
        dtype: of the result.
    """
    tokens, top_k = weights.shape
    hidden = outputs.shape[1]
    result = outputs.new_empty((tokens, hidden), dtype=dtype)
    block = min(1024, max(16, triton.next_power_of_2(hidden)))
    launch(
        _combine,
        (tokens, triton.cdiv(hidden, block)),
        outputs,
        rows.place,
        weights.contiguous(),
        rows.offsets,
        result,
        hidden,
        outputs.stride(0),
        outputs.stride(1),
        len(rows.offsets),
        TOP_K=top_k,
        PRODUCT=getattr(tl, str(torch.promote_types(outputs.dtype, weights.dtype))[6:]),
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,  # the product is rounded before it is added
    )
    return result


@triton.jit
def _keys(ids, slots, number, total, n_experts, TOP_K: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """The expert of each assignment, and after it its number: all different, in the sorted order."""
    inside = number < total
    expert = tl.load(ids + number, mask=inside, other=-1).to(tl.int32)
    held = (expert >= 0) & (expert < n_experts)
    if HAS_SLOTS:
        held = held & (tl.load(slots + number // TOP_K, mask=inside, other=-1) >= 0)
    return tl.where(held, expert, n_experts) * total + number


@triton.jit(
    do_not_specialize=["total"],
    do_not_specialize_on_alignment=["ids", "slots", "token", "place", "offsets", "n_experts"],
)
def _count_ranks(
    ids,
    slots,
    token,
    place,
    offsets,
    total,
    n_experts,
    TOP_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of RANKS assignments, or of the ends of RANKS experts, count the assignments that come before."""
    program, row_programs = tl.program_id(0), tl.cdiv(total, RANKS)
    is_rows = program < row_programs
    lane = tl.arange(0, RANKS)
    number = program * RANKS + lane
    expert = (program - row_programs) * RANKS + lane
    mine = (expert + 1) * total
    if is_rows:
        mine = _keys(ids, slots, number, total, n_experts, TOP_K, HAS_SLOTS)
    before = tl.zeros([RANKS, CHUNK], tl.int32)
    for start in range(0, total, CHUNK):
        # numbers past the end belong to no expert and come after all others
        other = _keys(ids, slots, start + tl.arange(0, CHUNK), total, n_experts, TOP_K, HAS_SLOTS)
        before += (other[None, :] < mine[:, None]).to(tl.int32)
    rank = tl.sum(before, axis=1)
    if is_rows:
        tl.store(place + number, rank.to(tl.int64), mask=number < total)
        tl.store(token + rank, (number // TOP_K).to(tl.int64), mask=number < total)
    else:
        tl.store(offsets + expert, rank, mask=expert < n_experts)


@triton.jit(do_not_specialize_on_alignment=["place", "weights", "offsets", "n_experts"])
def _combine(
    outputs,
    place,
    weights,
    offsets,
    result,
    hidden,
    row_stride,
    column_stride,
    n_experts,
    TOP_K: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    end = tl.load(offsets + n_experts - 1)
    # all loads first, so that they wait for memory together
    weighed = ()
    for j in tl.static_range(TOP_K):
        weighed += (tl.load(weights + token * TOP_K + j),)  # type: ignore[assignment]
    rows = ()
    for j in tl.static_range(TOP_K):
        rows += (tl.load(place + token * TOP_K + j),)  # type: ignore[assignment]
    read = ()
    for j in tl.static_range(TOP_K):
        at = outputs + rows[j] * row_stride + column * column_stride
        read += (tl.load(at, mask=inside & (rows[j] < end), other=0.0),)  # type: ignore[assignment]
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        weight = tl.where(rows[j] < end, weighed[j].to(tl.float32), 0.0)  # it may be anything
        total += (read[j].to(tl.float32) * weight).to(PRODUCT).to(tl.float32)
    tl.store(result + token * hidden + column, total.to(result.dtype.element_ty), mask=inside)
