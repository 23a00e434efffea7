"""Rotary positions of queries and keys in one launch, where PyTorch makes ten.

Models of transformers call a function of their own module. `fuse_rotary` puts another in its place, which keeps calling
the model's for whatever it does not know: tensors elsewhere, gradients, other shapes, types that were not tried.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from qllm.executor.gpu.launch import launch

NAME = "apply_rotary_pos_emb"
_HEADS = 8  # of one program

Pair = tuple[torch.Tensor, torch.Tensor]


def fuse_rotary(model: nn.Module, device_type: str = "cuda") -> int:
    """Let the rotary functions that `model` calls run as one launch where a probe finds that they are the usual ones.

    Args:
        model: where it is to run.
        device_type: where it is fused; elsewhere the functions do what they did.

    Returns:
        How many functions are fused. They are fused for all models whose code they belong to.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or weight.device.type != device_type:
        return 0
    fused = 0
    for module in _namespaces(model):
        function = getattr(module, NAME)
        rotary = function if isinstance(function, FusedRotary) else FusedRotary(function)
        rotary.try_out(weight.dtype, weight.device)
        if any(device == device_type for _, _, device in rotary.known):
            setattr(module, NAME, rotary)
            fused += 1
    return fused


def unfuse_rotary(model: nn.Module) -> int:
    """Undo `fuse_rotary`, for all models of these classes; returns the number of functions."""
    found = [module for module in _namespaces(model) if isinstance(getattr(module, NAME), FusedRotary)]
    for module in found:
        setattr(module, NAME, getattr(module, NAME).own)
    return len(found)


def _namespaces(model: nn.Module) -> list[ModuleType]:
    names = sorted({type(module).__module__ for module in model.modules()})
    return [sys.modules[name] for name in names if callable(getattr(sys.modules.get(name), NAME, None))]


class FusedRotary:
    """In the place of a model's own function: one launch for what was tried, the function for all else."""

    def __init__(self, own: Callable[..., Any]):
        self.own = own
        self.known: set[tuple[str, torch.dtype, str]] = set()  #: (form, type, kind of device) that agreed

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        if rest or options or torch.is_grad_enabled() or not _fits(q, k, cos, sin):
            return self.own(q, k, cos, sin, *rest, **options)
        for form in _forms(q.shape[-1], cos.shape[-1]):
            if (form, q.dtype, q.device.type) in self.known:
                return rotate(q, k, cos, sin, form)
        return self.own(q, k, cos, sin)

    @torch.no_grad()
    def try_out(self, dtype: torch.dtype, device: torch.device) -> None:
        """Find out which forms the function computes in `dtype`, and whether the kernel does the same."""
        numbers = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=numbers, device=device).to(dtype)

        q, k = draw(2, 5, 3, 32).transpose(1, 2), draw(2, 5, 1, 32).transpose(1, 2)
        for form, width in (("whole", 32), ("part", 24), ("halves", 16)):
            cos, sin = draw(2, 5, width), draw(2, 5, width)
            try:
                found = self.own(q, k, cos, sin)
                same = all(torch.equal(a, b) for a, b in zip(found, _plain(q, k, cos, sin, form), strict=True))
            except Exception:  # it takes other arguments, or other widths
                continue
            if same and all(_close(a, b) for a, b in zip(rotate(q, k, cos, sin, form), found, strict=True)):
                self.known.add((form, dtype, device.type))


def _forms(width: int, turned: int) -> tuple[str, ...]:
    if turned == width:
        return ("whole",)
    # half as wide: a model's function was tried with each, and agrees with one at most
    return ("halves", "part") if 2 * turned == width else ("part",) if turned < width else ()


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    batch, _, steps, width = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    return (
        batch > 0
        and q.numel() > 0
        and k.dim() == 4
        and (k.shape[0], *k.shape[2:]) == (batch, steps, width)
        and k.numel() > 0
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == steps
        and cos.shape[2] % 2 == 0
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and all(tensor.device == q.device and tensor.stride(-1) == 1 for tensor in (q, k, cos, sin))
    )


def _plain(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: str) -> Pair:
    """What the forms mean: the first columns turned, both halves of them by the same angles or each by its own."""
    if form == "halves":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = cos.shape[-1]

    def one(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :turned].chunk(2, -1)
        return torch.cat((x[..., :turned] * cos + torch.cat((-second, first), -1) * sin, x[..., turned:]), -1)

    return one(q), one(k)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    step = torch.finfo(a.dtype).eps
    return torch.allclose(a.float(), b.float(), rtol=2 * step, atol=2 * step)


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: str = "whole") -> Pair:
    """Queries `q` [B, H, T, D] and keys `k` [B, H', T, D] turned; each result lies in memory as [B, T, H, D].

    Products and sum are rounded one by one, as PyTorch does.

    Args:
        q: any strides but the last, which is 1; `k` too.
        k: with heads of its own.
        cos: [B or 1, T, R], as `sin`.
        sin: R is D for `whole`, less for `part` (the rest passes through), D / 2 for `halves` (both turn alike).
        form: `whole`, `part` or `halves`.
    """
    (batch, q_heads, steps, width), k_heads = q.shape, k.shape[1]
    q_out, k_out = (x.new_empty((batch, steps, x.shape[1], width)) for x in (q, k))
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    half = cos.shape[2] if form == "halves" else cos.shape[2] // 2
    rest = width - 2 * half
    launch(
        _rotate,
        (batch * steps, triton.cdiv(q_heads, _HEADS) + triton.cdiv(k_heads, _HEADS)),
        *(q, k, cos, sin, q_out, k_out),
        *(steps, q_heads, k_heads, width, half),
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        SECOND=0 if form == "halves" else half,
        HEADS=_HEADS,
        HALF=max(8, triton.next_power_of_2(half)),
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


@triton.jit
def _turn(
    x,
    out,
    head,
    heads,
    head_stride,
    width,
    half,
    cos,
    sin,
    other_cos,
    other_sin,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    column = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (column < half)[None, :]
    source = x + head.to(tl.int64)[:, None] * head_stride + column[None, :]
    target = out + head[:, None] * width + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    left = (first * cos[None, :]).to(kind).to(tl.float32) - (second * sin[None, :]).to(kind).to(tl.float32)
    right = (second * other_cos[None, :]).to(kind).to(tl.float32) + (first * other_sin[None, :]).to(kind).to(tl.float32)
    tl.store(target, left.to(kind), mask=inside)
    tl.store(target + half, right.to(kind), mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)
        inside = (head < heads)[:, None] & (column < width)[None, :]
        rest = tl.load(x + head.to(tl.int64)[:, None] * head_stride + column[None, :], mask=inside)
        tl.store(out + head[:, None] * width + column[None, :], rest, mask=inside)


@triton.jit(do_not_specialize=["steps"])
def _rotate(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    steps,
    q_heads,
    k_heads,
    width,
    half,
    q_batch,
    q_head,
    q_step,
    k_batch,
    k_head,
    k_step,
    cos_batch,
    cos_step,
    sin_batch,
    sin_step,
    SECOND: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    batch, step = (row // steps).to(tl.int64), (row % steps).to(tl.int64)
    column = tl.arange(0, HALF)
    inside = column < half
    cos += batch * cos_batch + step * cos_step
    sin += batch * sin_batch + step * sin_step
    c = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    other_c = tl.load(cos + SECOND + column, mask=inside, other=0.0).to(tl.float32)
    other_s = tl.load(sin + SECOND + column, mask=inside, other=0.0).to(tl.float32)
    head = part * HEADS + tl.arange(0, HEADS)
    q_parts = tl.cdiv(q_heads, HEADS)
    if part < q_parts:
        out = q_out + row.to(tl.int64) * q_heads * width
        x = q + batch * q_batch + step * q_step
        _turn(x, out, head, q_heads, q_head, width, half, c, s, other_c, other_s, HALF, REST)
    else:
        out = k_out + row.to(tl.int64) * k_heads * width
        x = k + batch * k_batch + step * k_step
        _turn(x, out, head - q_parts * HEADS, k_heads, k_head, width, half, c, s, other_c, other_s, HALF, REST)
