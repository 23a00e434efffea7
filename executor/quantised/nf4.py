"""NF4, four bits a weight (QLoRA, arXiv 2305.14314): the nearest of 16 levels, times the largest value of its block.

Levels and order of the bits are those of bitsandbytes, without double quantisation: two values a byte, the first one in
the higher bits, and a float32 for each block of inputs of an output. That is 0.28 of the bytes of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from qllm.executor.quantised.weights import QuantisedWeights, rows_at_once

BLOCK = 64  # inputs that share a scale
#: Quantiles of the normal distribution, scaled to [-1, 1]; 0 is one of them.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4 of a weight, block by block along its inputs; the last block is filled up with zeros.

    Args:
        weight: `[N, K]`, N outputs of K inputs, of any floating type.

    Returns:
        codes: uint8 `[N, blocks * BLOCK / 2]`, two values each.
        scales: float32 `[N, blocks]`, the largest magnitude in each block.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    parts = [_quantise(part) for part in weight.detach().split(rows_at_once(weight.shape[1], weight.device))]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    if not scales.isfinite().all():
        raise ValueError("weights are NaN or infinite")
    return codes, scales


def _quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=2)
    relative = (blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(2)).flatten(1)
    codes = torch.zeros(relative.shape, dtype=torch.uint8, device=weight.device)
    levels = torch.tensor(LEVELS)
    for middle in ((levels[1:] + levels[:-1]) / 2).tolist():  # a third of the time of a binary search for each weight
        codes += relative > middle
    return codes[:, ::2] * 16 + codes[:, 1::2], scales


def nf4_bytes(count: int, outputs: int, inputs: int) -> int:
    """Bytes that `count` weights `[outputs, inputs]` take."""
    return count * outputs * -(-inputs // BLOCK) * (BLOCK // 2 + 4)


class Nf4Weights(QuantisedWeights):
    """Weights `[N, K]` of one shape in NF4.

    Args:
        weights: the plain ones, looked at one by one.
        count: how many there are.
        device: where they are quantised, and kept.

    Raises:
        ValueError: a weight is NaN or infinite.
    """

    form = "nf4"
    pairs: torch.Tensor

    def __init__(self, weights: Iterable[torch.Tensor], count: int, device: torch.device):
        super().__init__()
        for i, weight in enumerate(weights):
            codes, scales = quantise(weight.to(device))
            if i == 0:
                self._inputs = weight.shape[1]
                self.register_buffer("codes", codes.new_empty(count, *codes.shape))
                self.register_buffer("scales", scales.new_empty(count, *scales.shape))
            self.codes[i], self.scales[i] = codes, scales
        levels = torch.tensor(LEVELS, device=device)
        pairs = torch.cartesian_prod(levels, levels)  # the two values of each byte; looked up as one number
        self.register_buffer("pairs", pairs.view(torch.int64).squeeze(1), persistent=False)

    def _room(self, dtype: torch.dtype) -> torch.Tensor:
        _, outputs, blocks = self.scales.shape
        return torch.empty(outputs, blocks, BLOCK, dtype=dtype, device=self.codes.device)

    def _expand(self, which: int, room: torch.Tensor) -> torch.Tensor:
        rows = rows_at_once(room[0].numel(), room.device)
        parts = zip(*(of.split(rows) for of in (self.codes[which], self.scales[which], room)), strict=True)
        for codes, scales, out in parts:
            values = self.pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
            torch.mul(values.view(out.shape), scales.unsqueeze(2), out=out)
        return room.flatten(1)[:, : self._inputs]
