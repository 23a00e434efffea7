"""Sampling where the logits are on an accelerator: all rows of a batch together, with one copy each way.

The rules are those of `qllm.executor.sampling.sampling`. A weight is a whole number here, since sums of whole numbers
do not depend on the order in which a kernel adds them: from the same logits a request draws the same token, whoever
shares its batch. A token of less than 2**-40 of the likeliest one's probability is never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.sampling import uniform

ONE = 2.0**40  # the weight of a row's likeliest token; those of 2**22 tokens have a sum below 2**63
AT_ONCE = 1 << 23  # logits drawn from at once: each takes some 40 bytes of temporary memory


def sample_on_device(
    logits: torch.Tensor, params: Sequence[SamplingParams], generated: Sequence[int], seeds: Sequence[int]
) -> list[int | None]:
    """One token id per row of `logits` `[rows, vocab]`; None where the row holds NaN or inf, or allows nothing.

    The host waits once, for the tokens.
    """
    if not params:
        return []
    vocab = logits.shape[1]
    # Rows with filters come last, so that each of the two groups is a slice.
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    drawn.sort(key=lambda i: (_filters(params[i], vocab), i))
    plain = sum(not _filters(params[i], vocab) for i in drawn)
    forbidden = [
        row * vocab + token
        for row, (p, n) in enumerate(zip(params, generated, strict=True))
        if n < p.min_tokens
        for token in sorted(p.stop)
        if token < vocab
    ]
    top_k = [min(params[i].top_k or vocab, vocab) for i in drawn]
    whole = np.array([*forbidden, *drawn, *top_k], dtype=np.int64)
    real = np.array(
        [
            *(uniform(seeds[i], generated[i]) for i in drawn),
            *(params[i].temperature for i in drawn),
            *(params[i].top_p for i in drawn),
        ],
        dtype=np.float64,
    )
    sent = _send(np.concatenate([whole, real.view(np.int64)]), logits.device)
    if forbidden:
        logits = logits.clone(memory_format=torch.contiguous_format)
        logits.view(-1).index_fill_(0, sent[: len(forbidden)], float("-inf"))
    best, tokens = logits.max(dim=-1)  # NaN counts as largest
    if drawn:
        rows, k, *reals = sent[len(forbidden) :].view(5, len(drawn))
        number, temperature, top_p = (each.view(torch.float64) for each in reals)
        step = max(1, AT_ONCE // vocab)
        for start, stop, filtered in ((0, plain, False), (plain, len(drawn), True)):
            for first in range(start, stop, step):
                some = slice(first, min(first + step, stop))
                each = rows[some]
                values = logits.index_select(0, each).float()
                weights = _Weights(best.index_select(0, each).float(), temperature[some].float())
                cut = _cut(values, weights, k[some], top_p[some]) if filtered else None
                tokens.index_copy_(0, each, _draw(values, weights, cut, number[some]))
    found: list[int] = tokens.where(best.isfinite(), -1).tolist()
    return [token if token >= 0 else None for token in found]


def _filters(p: SamplingParams, vocab: int) -> bool:
    """Whether `p` leaves tokens out."""
    return 0 < p.top_k < vocab or p.top_p < 1


def _send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu" or not len(array):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _Weights:
    """Each row's probabilities but for their common factor, as whole numbers up to ONE."""

    def __init__(self, best: torch.Tensor, temperature: torch.Tensor):
        self._best, self._temperature = best[:, None], temperature[:, None]

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Weights int64 of logits `[rows, vocab]`; 0 where the row cannot be sampled."""
        ratio = ((values - self._best) / self._temperature).exp_()
        return ratio.nan_to_num_(0.0).mul_(ONE).long()  # exact: ONE is a power of two


def _cut(values: torch.Tensor, weights: _Weights, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least logit that each row of `[rows, vocab]` keeps, `[rows, 1]`."""
    falling = values.sort(dim=-1, descending=True).values
    threshold = falling.gather(1, top_k[:, None] - 1)
    cumulative = weights(falling).masked_fill_(falling < threshold, 0).cumsum(1)
    total = cumulative[:, -1]
    # The fewest most likely tokens whose probability reaches p, the one that reaches it included.
    target = (top_p * total).ceil().long().minimum(total)
    reached = torch.searchsorted(cumulative, target[:, None])
    return torch.maximum(threshold, falling.gather(1, reached))


def _draw(values: torch.Tensor, weights: _Weights, cut: torch.Tensor | None, number: torch.Tensor) -> torch.Tensor:
    """Token ids drawn from logits `[rows, vocab]`, of which those from `cut` on are kept, at uniform numbers."""
    each = weights(values)
    if cut is not None:
        each.masked_fill_(values < cut, 0)
    cumulative = each.cumsum(1)
    total = cumulative[:, -1]
    target = (number * total).long().minimum(total - 1)  # rounding must not reach beyond the last token kept
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
