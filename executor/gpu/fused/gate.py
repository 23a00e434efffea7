"""The usual gate of experts in one launch: SiLU of one half, times the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from qllm.executor.gpu.launch import launch


def is_plain_gate(module: nn.Module) -> bool:
    """Whether an experts module's gate is transformers' default, of halves one after the other, with SiLU."""
    default = getattr(type(module), "_apply_gate", None) is _default_apply_gate and "_apply_gate" not in vars(module)
    activation = getattr(module, "act_fn", None)
    plain = activation is F.silu or type(activation) in (nn.SiLU, SiLUActivation)
    return default and plain and bool(getattr(module, "has_gate", False))


def silu_and_mul(gate_up: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of the first half of each row of `gate_up` [S, 2N], rounded, times the second half: [S, N].

    Rows past the last of `offsets` (int32 [E]), where given, are neither read nor written.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    out = gate_up.new_empty((rows, width))
    if rows == 0:
        return out
    block = min(1024, max(16, triton.next_power_of_2(width)))
    launch(
        _silu_and_mul,
        (rows, triton.cdiv(width, block)),
        gate_up,
        offsets if offsets is not None else gate_up,
        out,
        width,
        gate_up.stride(0),
        LAST=len(offsets) - 1 if offsets is not None else -1,
        BLOCK=block,
        num_warps=4 if block > 256 else 1,
        enable_fp_fusion=False,
    )
    return out


@triton.jit(do_not_specialize_on_alignment=["offsets"])
def _silu_and_mul(gate_up, offsets, out, width, row_stride, LAST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if LAST >= 0:
        inside = inside & (row < tl.load(offsets + LAST))
    left = gate_up + row.to(tl.int64) * row_stride
    gate = tl.load(left + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(left + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + column, (silu * up).to(out.dtype.element_ty), mask=inside)
