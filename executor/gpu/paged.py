"""What the attention kernels share: slots of paged keys, logits in base 2, and sizes of tiles."""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

HOPPER_SHARED = 233472  # bytes of a multiprocessor

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def slots_of_keys(blocks, position, seen, BLOCK_SIZE: tl.constexpr):
    """Slots (int64) of the keys at `position`, where `seen`, of the sequence whose block table begins at `blocks`."""
    block = tl.load(blocks + position // BLOCK_SIZE, mask=seen, other=0)
    return block * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def logits_of(products, scale, cap, CAPPED: tl.constexpr):
    """Logits times log2(e), so that softmax is by exp2; `scale` and `cap` are those of `Logits`."""
    if CAPPED:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), without an infinity over an infinity.
        return cap - 2.0 * cap / (1.0 + tl.exp2(products * scale))
    return products * scale


class Logits:
    """The numbers that `logits_of` wants: with a soft cap `scale` makes exp2's argument, without one the logits."""

    def __init__(self, scale: float, softcap: float | None):
        self.capped = softcap is not None
        self.scale = scale * LOG2E.value if softcap is None else 2 * LOG2E.value * scale / softcap
        self.cap = 0.0 if softcap is None else softcap * LOG2E.value


def padded(width: int) -> int:
    """The power of two, at least 16, in which a head's width is computed."""
    return max(16, int(triton.next_power_of_2(width)))


def keys_in_tile(key_width: int, value_width: int, dtype: torch.dtype, most: int, budget: int) -> int:
    """Keys whose K and V, padded, take at most `budget` bytes: a power of two from 16 to `most`."""
    bytes_of_key = (padded(key_width) + padded(value_width)) * dtype.itemsize
    keys = most
    while keys > 16 and keys * bytes_of_key > budget:
        keys //= 2
    return keys


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of one multiprocessor; where there is no GPU, as many as a Hopper has."""
    if device.type != "cuda":
        return HOPPER_SHARED
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
