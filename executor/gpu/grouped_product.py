"""The products of one MoE layer's experts in one launch: each expert's rows through its weight.

Where its rows end is read on the device. The grid is bounded by shapes alone; programs that find no work exit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from qllm.executor.gpu.launch import launch

#: Rows of a tile: (columns, depth, warps, stages) for two bytes a number, and for four.
_TILES = {
    16: ((64, 128, 4, 4), (64, 64, 4, 3)),  # few rows an expert: reading weights decides; 48 KB of them in flight
    64: ((128, 64, 4, 3), (64, 32, 4, 3)),
    128: ((128, 32, 4, 4), (64, 32, 8, 3)),
}


def tile_rows(rows: int, n_experts: int) -> int:
    """Rows of a tile, for `rows` rows at `n_experts` experts: 16, 64 or 128.

    Tiles of other rows may sum in another order: whoever runs a layer's experts in slices gives the whole layer's.
    """
    each = rows / n_experts
    return 16 if each <= 16 else 64 if each <= 96 else 128


def grouped_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: int | None = None,
) -> torch.Tensor:
    """`rows` through the weight of each row's expert, and its bias: [S, N].

    A row's bits depend on the row, its expert and the kernel alone: not on the experts that the call covers, nor on the
    number of rows that they have. In the kernel here this is so by construction, for one `tile`.

    Args:
        rows: [S, K], sorted by expert. Expert 0 begins at row 0.
        weight: [E, K, N], any strides: a transposed view, a slice of a layer's experts.
        offsets: int32 [E], where each expert's rows end. Outputs of rows past the last are left as memory was.
        bias: [E, N], or none.
        tile: rows of a tile; by default `tile_rows` of this call.
    """
    if takes_torch(rows, weight):
        out = F.grouped_mm(rows, weight, offs=offsets)
        if bias is not None:
            _add_bias(out, offsets, bias)
        return out
    return triton_product(rows, weight, offsets, bias, tile)


def takes_torch(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch has a kernel for these. For others its `grouped_mm` waits for the host, or refuses them."""
    if rows.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    major = torch.cuda.get_device_capability(rows.device)[0]
    return major in (9, 10) and fits_torch(rows, weight)  # not 12, consumers' cards


def fits_torch(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's kernel takes these types, shapes and strides: 16-byte steps in both operands and the result."""
    n_experts, depth, columns = weight.shape
    row_major = weight.stride(2) == 1 and weight.stride(1) >= columns
    lead = weight.stride(1) if row_major else weight.stride(2)
    whole = row_major or (weight.stride(1) == 1 and lead >= depth)
    aligned = all(n % 8 == 0 for n in (depth, columns, rows.stride(0), lead, weight.stride(0)))
    pointers = rows.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    layout = whole and aligned and pointers and rows.stride(1) == 1 and rows.stride(0) >= depth
    return layout and rows.dtype == weight.dtype == torch.bfloat16 and n_experts < 1024


def triton_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: int | None = None,
) -> torch.Tensor:
    """`grouped_product` by the kernel here: float32 (in full precision), float16 and bfloat16 of any shape."""
    (total, depth), (n_experts, _, columns) = rows.shape, weight.shape
    out = rows.new_empty((total, columns))
    if total == 0:
        return out
    block_rows = tile or tile_rows(total, n_experts)
    block_columns, block_depth, warps, stages = _TILES[block_rows][rows.element_size() == 4]
    if depth % block_depth and depth % 64 == 0 and block_depth == 128:  # half as deep, and no masks
        block_depth, stages = 64, 6
    hit = min(n_experts, total)
    tiles = hit + (total - hit) // block_rows  # most when each expert has a row, and one all others
    launch(
        _multiply,
        (tiles * triton.cdiv(columns, block_columns),),
        rows,
        weight,
        bias if bias is not None else rows,
        offsets,
        out,
        tiles,
        columns,
        depth,
        n_experts,
        *rows.stride(),
        *weight.stride(),
        *(bias.stride() if bias is not None else (0, 0)),
        HAS_BIAS=bias is not None,
        EXPERTS=max(16, triton.next_power_of_2(n_experts)),
        ROWS=block_rows,
        COLUMNS=block_columns,
        DEPTH=block_depth,
        WHOLE_DEPTH=depth % block_depth == 0,
        TOGETHER=8,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _add_bias(out: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor) -> None:
    """Add to each row the bias of its expert, in place."""
    total, columns = out.shape
    n_experts = len(offsets)
    launch(
        _add_bias_kernel,
        (triton.cdiv(total, 8), triton.cdiv(columns, 256)),
        out,
        offsets,
        bias,
        total,
        columns,
        n_experts,
        out.stride(0),
        *bias.stride(),
        EXPERTS=max(16, triton.next_power_of_2(n_experts)),
        ROWS=8,
        COLUMNS=256,
        num_warps=4,
    )


@triton.jit(
    do_not_specialize=["tiles"],
    do_not_specialize_on_alignment=["bias", "offsets", "n_experts"],
)
def _multiply(
    rows,
    weight,
    bias,
    offsets,
    out,
    tiles,
    columns,
    depth,
    n_experts,
    row_stride,
    row_depth_stride,
    expert_stride,
    weight_depth_stride,
    weight_column_stride,
    bias_expert_stride,
    bias_column_stride,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    # TOGETHER tiles of rows, mostly of one expert, run beside each other at the same columns: they share weights
    program, column_tiles = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    first = program // (TOGETHER * column_tiles) * TOGETHER
    beside = tl.minimum(tiles - first, TOGETHER)
    inner = program - first * column_tiles
    tile = first + inner % beside
    column = inner // beside * COLUMNS + tl.arange(0, COLUMNS)

    experts = tl.arange(0, EXPERTS)
    held = experts < n_experts
    ends = tl.load(offsets + experts, mask=held, other=0)
    starts = tl.load(offsets + experts - 1, mask=held & (experts > 0), other=0)
    counts = tl.where(held, tl.cdiv(ends - starts, ROWS), 0)
    until = tl.cumsum(counts, 0)
    if tile >= tl.sum(counts):
        return
    expert = tl.sum((until <= tile).to(tl.int32))
    is_mine = experts == expert
    start, end = tl.sum(tl.where(is_mine, starts, 0)), tl.sum(tl.where(is_mine, ends, 0))
    tile_in_expert = tile - tl.sum(tl.where(is_mine, until - counts, 0))

    # offsets within a tile are 32 bits wide: half the registers
    first_row = start + tile_in_expert * ROWS
    row, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    left = rows + first_row.to(tl.int64) * row_stride
    right = weight + expert.to(tl.int64) * expert_stride
    left_offsets = row[:, None] * row_stride + k[None, :] * row_depth_stride
    right_offsets = k[:, None] * weight_depth_stride + column[None, :] * weight_column_stride
    in_rows, in_columns = (row < end - first_row)[:, None], (column < columns)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, depth, DEPTH):
        if WHOLE_DEPTH:
            a = tl.load(left + left_offsets, mask=in_rows, other=0.0)
            b = tl.load(right + right_offsets, mask=in_columns, other=0.0)
        else:
            a = tl.load(left + left_offsets, mask=in_rows & (k < depth - done)[None, :], other=0.0)
            b = tl.load(right + right_offsets, mask=in_columns & (k < depth - done)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += DEPTH * row_depth_stride
        right += DEPTH * weight_depth_stride
    if HAS_BIAS:
        line = bias + expert.to(tl.int64) * bias_expert_stride + column * bias_column_stride
        total += tl.load(line, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    target = out + first_row.to(tl.int64) * columns + row[:, None] * columns + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=in_rows & in_columns)


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=["offsets", "n_experts"])
def _add_bias_kernel(
    out,
    offsets,
    bias,
    total,
    columns,
    n_experts,
    row_stride,
    bias_expert_stride,
    bias_column_stride,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    experts = tl.arange(0, EXPERTS)
    held = experts < n_experts
    ends = tl.load(offsets + experts, mask=held, other=0)
    expert = tl.sum((held[None, :] & (ends[None, :] <= row[:, None])).to(tl.int32), axis=1)
    inside = ((row < total) & (expert < n_experts))[:, None] & (column < columns)[None, :]
    line = bias + expert.to(tl.int64)[:, None] * bias_expert_stride + column[None, :] * bias_column_stride
    target = out + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    sums = tl.load(target, mask=inside).to(tl.float32) + tl.load(line, mask=inside).to(tl.float32)
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside)
