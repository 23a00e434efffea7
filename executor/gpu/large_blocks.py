"""Attention of long blocks of a prompt by PyTorch's own kernels, in few calls without a mask of their own.

cuDNN's kernel is the fastest on some GPUs, but it prepares a plan for every shape that it has not seen, which keeps the
host busy for long. So it gets rows and keys in multiples of `REGULAR` alone, of which there are few. FlashAttention-2,
which needs no plan, gets the rest, and results over different keys are merged by their log-sum-exp. A row's bits depend
on the block that it is computed in: on its rows, its keys and its place.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

HALVES = (torch.float16, torch.bfloat16)
WIDEST = 256
REGULAR = 2048  #: rows and keys of cuDNN's calls are multiples of this

#: Kinds of calls that cuDNN refused: (device, dtype, q's shape, k's shape, is_causal). They are not tried again.
refused: set[tuple[object, ...]] = set()


def suits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_block` takes such tensors: by their dtype, widths and device alone."""
    if not q.dtype == k.dtype == v.dtype or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return False
    if q.shape[-1] > WIDEST or q.shape[-1] % 8 or q.dtype not in HALVES:
        return False
    return q.device.type == "cpu" or (q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0))


def attend_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """Causal attention of q `[rows, heads, D]`, the last `rows` of the L keys, into `out` `[rows, heads, D]`.

    k and v are `[L, kv_heads, D]`, L at least `rows`. Which kernels compute it follows from shapes, dtype and device.
    """
    rows, before = q.shape[0], k.shape[0] - q.shape[0]
    on_cpu = q.device.type == "cpu"
    cut = rows // REGULAR * REGULAR if on_cpu or prefers_cudnn(*in_heads(q, k, v), scale) else 0
    for first, last in ((0, cut), (cut, rows)):
        if first < last:
            attend_rows = by_pieces if on_cpu or last == cut else at_once
            out[first:last] = attend_rows(q[first:last], k[: before + last], v[: before + last], scale)


def in_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[L, heads, D]` as `[1, heads, L, D]`."""
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`attend_block` on a GPU by FlashAttention-2, for which causal means that the rows are the last of the keys."""
    return flash(*in_heads(q, k, v), True, scale)[0][0].transpose(0, 1)


def by_pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`attend_block` for rows of a regular number: over their own keys, a regular number before them, and the rest."""
    before = k.shape[0] - q.shape[0]
    regular = before // REGULAR * REGULAR
    queries, keys, values = in_heads(q, k, v)
    result, lse = attend(queries, keys[:, :, before:], values[:, :, before:], True, scale)
    for first, last in ((regular, before), (0, regular)):
        if first < last:
            some, some_lse = attend(queries, keys[:, :, first:last], values[:, :, first:last], False, scale)
            share = torch.sigmoid(some_lse - lse).unsqueeze(-1)  # of these keys in the sum of exponentials
            result = result.float().lerp_(some.float(), share)
            lse = torch.logaddexp(lse, some_lse)
    return result


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q `[1, heads, rows, D]` as `[rows, heads, D]`, and its log-sum-exp (float32 `[rows, heads]`).

    k and v are `[1, kv_heads, L, D]`; where causal, L is the number of rows.
    """
    _, heads, rows, _ = q.shape
    kind = (q.device, q.dtype, q.shape, k.shape, is_causal)
    if q.device.type == "cpu":
        group = heads // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif k.shape[2] % REGULAR or kind in refused:
        out, lse = flash(q, k, v, is_causal, scale)
    else:
        try:
            # cuDNN takes fewer KV heads than query heads as they are. Its log-sum-exp is [1, heads, rows, 1].
            out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, is_causal, False, scale=scale
            )[:2]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            refused.add(kind)
            out, lse = flash(q, k, v, is_causal, scale)
    return out[0].transpose(0, 1), lse.reshape(heads, rows).transpose(0, 1)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2, which knows grouped heads; the log-sum-exp is `[1, heads, rows]`."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    return out, lse


def prefers_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether `scaled_dot_product_attention` would take cuDNN for such tensors on their device."""
    grouped = q.shape[1] != k.shape[1]
    choice: int = torch._fused_sdp_choice(q, k, v, None, 0.0, False, scale=scale, enable_gqa=grouped)
    return choice == SDPBackend.CUDNN_ATTENTION.value
