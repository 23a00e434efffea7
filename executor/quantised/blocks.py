"""Weights as released checkpoints hold them: small floating-point numbers, and a scale for each block of them.

fp8     E4M3, a byte each, and a scale for a block of rows and columns (DeepSeek-V3, Qwen3-FP8, MiniMax-M2)
mxfp8   E4M3, and a power of two for 32 inputs of an output (OCP Microscaling Formats 1.0)
mxfp4   E2M1, two in a byte, the first one in the lower bits, and a power of two for 32 inputs (the same; gpt-oss)
"""

from __future__ import annotations

from functools import cache

import torch

from qllm.executor.quantised.weights import QuantisedWeights, rows_at_once

#: Values in a byte of each form.
IN_A_BYTE = {"fp8": 1, "mxfp8": 1, "mxfp4": 2}
MX_BLOCK = 32  # inputs that share a power of two
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits of a value; the fourth is the sign


@cache
def _powers(device: torch.device) -> torch.Tensor:
    """The scale of each byte of E8M0, 2^(byte - 127)."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu).float()


@cache
def _pairs(in_a_byte: int, device: torch.device) -> torch.Tensor:
    """Two float32 values, looked up as one number, of each byte (E2M1) or of each two bytes (E4M3)."""
    if in_a_byte == 2:
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)
        pairs = torch.cartesian_prod(values, values).flip(1).contiguous()
    else:
        both = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.uint16)
        pairs = both.view(torch.float8_e4m3fn).float()
    return pairs.view(torch.int64).flatten()


class BlockWeights(QuantisedWeights):
    """Weights `[N, K]` of one shape in fp8, mxfp8 or mxfp4, made empty and filled by `put`.

    Args:
        form: which of them.
        shape: how many weights, N and K.
        block: N and K of a block. Blocks at the end are smaller where it does not divide.
        parts: weights that lie stacked along N, each with blocks of its own.
        powers: whether scales are powers of two, a byte each; else they are kept in float32.
        device: where they are kept.
    """

    scale_of: torch.Tensor

    def __init__(
        self,
        form: str,
        shape: tuple[int, int, int],
        block: tuple[int, int],
        parts: int,
        powers: bool,
        device: torch.device,
    ):
        super().__init__()
        self.form = form
        count, outputs, self._inputs = shape
        self._parts = parts
        self._inputs_in_block = block[1]
        of_part = outputs // parts
        scale_rows, scale_columns = scales_shape((of_part, self._inputs), block)
        codes = torch.empty(count, outputs, self._inputs // IN_A_BYTE[form], dtype=torch.uint8, device=device)
        scale_dtype = torch.uint8 if powers else torch.float32
        scales = torch.empty(count, parts * scale_rows, scale_columns, dtype=scale_dtype, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        first = torch.arange(parts, device=device).unsqueeze(1) * scale_rows
        rows = first + torch.arange(of_part, device=device) // block[0]
        self.register_buffer("scale_of", rows.flatten(), persistent=False)  # of each output, its row of scales

    def put(self, which: int | slice, part: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill a part of weight number `which`, or of all, with what a file holds."""
        given = scales.view(torch.uint8) if self.scales.dtype is torch.uint8 else scales
        for buffer, values in ((self.codes, codes.view(torch.uint8)), (self.scales, given)):
            rows = buffer.unflatten(1, (self._parts, -1))[which, ..., part, :, :]
            rows.copy_(values.reshape(rows.shape))

    def _room(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.codes.shape[1], self._inputs, dtype=dtype, device=self.codes.device)

    def _expand(self, which: int, room: torch.Tensor) -> torch.Tensor:
        scales = self.scales[which]
        if scales.dtype is torch.uint8:
            scales = _powers(scales.device).index_select(0, scales.flatten().int()).view(scales.shape)
        if len(scales) != len(room):
            scales = scales.index_select(0, self.scale_of)
        size = self._inputs_in_block
        rows = rows_at_once(self._inputs, room.device)
        parts = zip(*(of.split(rows) for of in (self.codes[which], scales, room)), strict=True)
        for codes, of_blocks, out in parts:
            values = self._values(codes)
            if self._inputs % size:
                torch.mul(values, of_blocks.repeat_interleave(size, 1)[:, : self._inputs], out=out)
            else:
                torch.mul(values.unflatten(1, (-1, size)), of_blocks.unsqueeze(2), out=out.unflatten(1, (-1, size)))
        return room

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[n, bytes]` without their scales, float32 `[n, K]`."""
        in_a_byte = IN_A_BYTE[self.form]
        if in_a_byte == 1 and (codes.device.type != "cpu" or self._inputs % 2):
            return codes.view(torch.float8_e4m3fn).float()  # six times as slow on a CPU as a table
        looked_up = codes if in_a_byte == 2 else codes.view(torch.uint16)
        pairs = _pairs(in_a_byte, codes.device).index_select(0, looked_up.flatten().int())
        return pairs.view(torch.float32).view(len(codes), self._inputs)


def scales_shape(weight: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the scales of a weight `[N, K]`."""
    rows, columns = (-(-size // of) for size, of in zip(weight, block, strict=True))
    return rows, columns


def block_bytes(form: str, shape: tuple[int, int, int], block: tuple[int, int], scale_bytes: int) -> int:
    """Bytes that weights of `shape` take, those stacked in one another left out of account."""
    count, outputs, inputs = shape
    rows, columns = scales_shape((outputs, inputs), block)
    return count * (outputs * (inputs // IN_A_BYTE[form]) + rows * columns * scale_bytes)
