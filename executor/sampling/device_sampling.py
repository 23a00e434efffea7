"""Sampling where the logits are on an accelerator: all rows of a batch together, with one copy each way.

The rules are those of `qllm.executor.sampling.sampling`. A weight is a whole number here, since sums of whole numbers
do not depend on the order in which a kernel adds them: from the same logits a request draws the same token, whoever
shares its batch. A token of less than 2**-40 of the likeliest one's probability is never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qllm.executor.sampling.device_rows import changed_on_device, logprobs_on_device, read_logprobs, send
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import RowState
from qllm.executor.sampling.sampling import forbids, picked, uniform

ONE = 2.0**40  # the weight of a row's likeliest token; those of 2**22 tokens have a sum below 2**63
AT_ONCE = 1 << 23  # logits drawn from at once: each takes some 40 bytes of temporary memory


def sample_on_device(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generated: Sequence[int],
    seeds: Sequence[int],
    states: Sequence[RowState | None] = (),
) -> list[int | None]:
    """One token id per row of `logits` `[rows, vocab]`; None where the row holds NaN or inf, or allows nothing.

    `states` as in `qllm.executor.sampling.sampling.sample`. The host waits once, for the tokens.
    """
    if not params:
        return []
    n, device = len(params), logits.device
    tokens = _choose(logits, params, generated, seeds, states)
    changed = [i for i, state in enumerate(states) if state is not None and state.changes]
    if changed:
        values = changed_on_device(logits, changed, params, generated, states)
        chosen = _choose(values, picked(params, changed), picked(generated, changed), picked(seeds, changed))
        tokens.index_copy_(0, send(np.array(changed, dtype=np.int64), device), chosen)
    told = [(i, state, state.top) for i, state in enumerate(states) if state is not None and state.top is not None]
    if not told:
        return [token if token >= 0 else None for token in tokens.tolist()]
    width = min(max(top for _, _, top in told), logits.shape[1])
    logprobs = logprobs_on_device(logits, tokens, [i for i, _, _ in told], width)
    found = torch.cat([tokens.double(), logprobs.flatten()]).tolist()  # token ids are exact in float64
    for first, (i, state, top) in zip(range(n, len(found), 1 + 2 * width), told, strict=True):
        numbers = found[first : first + 1 + 2 * width]
        state.logprobs = read_logprobs(numbers, width, min(top, width)) if found[i] >= 0 else None
    return [int(token) if token >= 0 else None for token in found[:n]]


def _choose(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generated: Sequence[int],
    seeds: Sequence[int],
    states: Sequence[RowState | None] = (),
) -> torch.Tensor:
    """Token ids int64 `[rows]` on the device; -1 where there is none. Those of rows that `states` change are void."""
    vocab = logits.shape[1]
    # Rows with filters come last, so that each of the two groups is a slice.
    void = {i for i, state in enumerate(states) if state is not None and state.changes}
    drawn = [i for i, p in enumerate(params) if p.temperature > 0 and i not in void]
    drawn.sort(key=lambda i: (_filters(params[i], vocab), i))
    plain = sum(not _filters(params[i], vocab) for i in drawn)
    forbidden = [
        row * vocab + token
        for row, (p, n) in enumerate(zip(params, generated, strict=True))
        if row not in void and forbids(p, n)
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
            *(params[i].min_p for i in drawn),
        ],
        dtype=np.float64,
    )
    sent = send(np.concatenate([whole, real.view(np.int64)]), logits.device)
    if forbidden:
        logits = logits.clone(memory_format=torch.contiguous_format)
        logits.view(-1).index_fill_(0, sent[: len(forbidden)], float("-inf"))
    best, tokens = logits.max(dim=-1)  # NaN counts as largest
    if drawn:
        rows, k, *reals = sent[len(forbidden) :].view(6, len(drawn))
        number, temperature, top_p, min_p = (each.view(torch.float64) for each in reals)
        leaves = any(params[i].min_p > 0 for i in drawn)
        step = max(1, AT_ONCE // vocab)
        for start, stop, filtered in ((0, plain, False), (plain, len(drawn), True)):
            for first in range(start, stop, step):
                some = slice(first, min(first + step, stop))
                each = rows[some]
                values = logits.index_select(0, each).float()
                weights = _Weights(best.index_select(0, each).float(), temperature[some].float())
                cut = _cut(values, weights, k[some], top_p[some], min_p[some] if leaves else None) if filtered else None
                tokens.index_copy_(0, each, _draw(values, weights, cut, number[some]))
    return tokens.where(best.isfinite(), -1)


def _filters(p: SamplingParams, vocab: int) -> bool:
    """Whether `p` leaves tokens out."""
    return 0 < p.top_k < vocab or p.top_p < 1 or p.min_p > 0


class _Weights:
    """Each row's probabilities but for their common factor, as whole numbers up to ONE."""

    def __init__(self, best: torch.Tensor, temperature: torch.Tensor):
        self._best, self._temperature = best[:, None], temperature[:, None]

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Weights int64 of logits `[rows, vocab]`; 0 where the row cannot be sampled."""
        ratio = ((values - self._best) / self._temperature).exp_()
        return ratio.nan_to_num_(0.0).mul_(ONE).long()  # exact: ONE is a power of two


def _cut(
    values: torch.Tensor, weights: _Weights, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor | None
) -> torch.Tensor:
    """The least logit that each row of `[rows, vocab]` keeps, `[rows, 1]`."""
    falling = values.sort(dim=-1, descending=True).values
    threshold = falling.gather(1, top_k[:, None] - 1)
    each = weights(falling).masked_fill_(falling < threshold, 0)
    if min_p is not None:
        each.masked_fill_(each < (min_p * ONE).ceil().long()[:, None], 0)
    cumulative = each.cumsum(1)
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
