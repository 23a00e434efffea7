"""RMS norms of a Hugging Face model in one launch each, where PyTorch makes six.

A norm is replaced only where a probe on random input and weights finds which of the known formulas it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import nn

from qllm.executor.gpu.launch import launch

#: Names under which modules keep what is added to the mean of squares.
_EPS = ("variance_epsilon", "eps", "epsilon")
_MAX_WIDTH = 16384


def _rounded_first(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * _normed(x, eps).to(x.dtype)


def _rounded_last(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return (weight.float() * _normed(x, eps)).to(x.dtype)


def _one_more(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return (_normed(x, eps) * (1.0 + weight.float())).to(x.dtype)


def _normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


#: What a norm may compute: Llama's, GPT-OSS's, Gemma's. Where two agree, as in float32, the first stands for both.
FORMS: tuple[Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor], ...] = (
    _rounded_first,
    _rounded_last,
    _one_more,
)


def fuse_norms(model: nn.Module, device_type: str = "cuda") -> int:
    """Let each RMS norm of `model` whose formula is known run as one launch; returns how many do.

    A norm keeps its own forward for whatever the kernel does not take: gradients, other types, tensors elsewhere.

    Args:
        model: where it is to run, with its weights.
        device_type: where norms are fused; elsewhere they stay as they are.
    """
    fused = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "forward" in vars(module) or not isinstance(weight, torch.Tensor) or weight.device.type != device_type:
            continue
        form, eps = norm_form(module, check_kernel=True), _eps(module)
        if form is not None and eps is not None:
            module.forward = partial(_forward, module, module.forward, form, eps, device_type)
            fused += 1
    return fused


def unfuse_norms(model: nn.Module) -> int:
    """Undo `fuse_norms`; returns the number of norms."""
    found = [module for module in model.modules() if getattr(vars(module).get("forward"), "func", None) is _forward]
    for module in found:
        del module.forward
    return len(found)


def norm_form(module: nn.Module, check_kernel: bool = False) -> int | None:
    """Which of FORMS a module computes from its one `weight` and its eps, found by trying; None for another.

    With `check_kernel` it is also None where the kernel does not agree with the module.
    """
    parameters = dict(module.named_parameters())
    named = type(module).__name__.endswith("Norm")
    if not named or list(parameters) != ["weight"] or _eps(module) is None or any(True for _ in module.buffers()):
        return None
    width = parameters["weight"].shape
    if len(width) != 1 or not 1 < width[0] <= _MAX_WIDTH or parameters["weight"].is_meta:
        return None
    return _probe(module, width[0], check_kernel)


def _eps(module: nn.Module) -> float | None:
    return next((float(v) for name in _EPS if isinstance(v := getattr(module, name, None), float)), None)


@torch.no_grad()
def _probe(module: nn.Module, width: int, check_kernel: bool) -> int | None:
    weight, eps = module.weight, _eps(module)
    assert isinstance(weight, torch.Tensor)
    assert eps is not None
    device = weight.device
    numbers = torch.Generator(device).manual_seed(0)
    trial = copy.deepcopy(module)
    random = torch.randn(width, generator=numbers, device=device)
    trial.weight = nn.Parameter(random.to(weight.dtype), requires_grad=False)
    rows = max(8, 4096 // width)
    # some rows so small that eps decides, some far from zero on average, some large
    scale = torch.logspace(-4, 2, rows, device=device)[:, None]
    x = (torch.randn(rows, width, generator=numbers, device=device) + 0.5) * scale
    x = x.to(weight.dtype).view(1, rows, width)
    try:
        got = trial(x)
    except Exception:  # it takes something else than one tensor: not a norm of this kind
        return None
    if not isinstance(got, torch.Tensor):
        return None
    found = next((i for i, form in enumerate(FORMS) if _same(got, form(x, trial.weight, eps))), None)
    if found is None or not check_kernel or _same(rms_norm(x, trial.weight, eps, found), got):
        return found
    return None


def _same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results differ by the rounding of a sum alone; where they are rounded, hardly any number does."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    step = torch.finfo(got.dtype).eps
    if not torch.allclose(got.float(), expected.float(), rtol=(8 if step < 1e-6 else 2) * step, atol=0):
        return False
    return step < 1e-6 or float((got != expected).float().mean()) < 0.02


def _forward(
    module: nn.Module,
    own: Callable[[torch.Tensor], torch.Tensor],
    form: int,
    eps: float,
    device_type: str,
    x: torch.Tensor,
) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    takes = x.device.type == device_type and x.dtype == weight.dtype and x.shape[-1] == len(weight) and x.numel() > 0
    if torch.is_grad_enabled() or not takes:
        return own(x)
    return rms_norm(x, weight, eps, form)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: int) -> torch.Tensor:
    """`x` [..., D] by the root mean square of its last dimension, times `weight` [D] as FORMS[form]; contiguous."""
    width = x.shape[-1]
    strides = _two_strides(x)
    if strides is None or x.stride(-1) != 1:
        x = x.contiguous()
        strides = (1, width, 0)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // width
    block = max(16, triton.next_power_of_2(width))
    together = max(1, min(2048 // block, 16) if rows >= 1024 else min(512 // block, 4))
    launch(
        _rms_norm,
        (triton.cdiv(rows, together),),
        x,
        weight,
        out,
        rows,
        width,
        *strides,
        eps,
        FORM=form,
        ROWS=together,
        WIDTH=block,
        num_warps=min(16, max(1, together * block // 256)),  # 16 bytes a thread of two-byte numbers
        enable_fp_fusion=False,  # as PyTorch's kernels round
    )
    return out


def _two_strides(x: torch.Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride): row `r` lies at `r // inner * outer stride + r % inner * inner stride`."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    if len(merged) == 2:
        return merged[0][0], merged[1][1], merged[0][1]
    return (1, merged[0][1] if merged else 0, 0) if len(merged) < 2 else None


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["inner"])
def _rms_norm(
    x,
    weight,
    out,
    rows,
    width,
    inner,
    outer_stride,
    inner_stride,
    eps,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    in_row = column < width
    inside = (row < rows)[:, None] & in_row[None, :]
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    value = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    normed = value * tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
    if FORM == 0:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    if FORM == 2:
        scale = 1.0 + scale
    result = (normed * scale).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], result, mask=inside)
