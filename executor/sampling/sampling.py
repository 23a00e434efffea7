"""Sampling: one batch of logits in, one token per row out.

Greedy rows take the largest logit. The others draw by inverse transform, in the order of token ids, with one uniform
number that depends only on the request's seed and its count of tokens. So from the same logits a request draws the same
token, whoever shares its batch. (The last bits of the logits may differ with the rows of a batch: see docs/engine.md.)

A filter keeps every token whose logit reaches a threshold, ties with the last one kept included, as transformers and
vLLM do for top-k; which of them came first would depend on the kernel that sorts.

This is how a CPU does it, a few rows at a time; for an accelerator see `qllm.executor.sampling.device_sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch

from qllm.executor.sampling.largest import BLOCK, in_blocks, largest_k, largest_of, rising
from qllm.executor.sampling.logprobs import logprobs_of
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import RowState

T = TypeVar("T")

FEW = 1024  #: tokens up to which a `top_k` looks at a row's largest logits alone
TIES = 16  # tokens beyond the k-th, to see whether some tie with it


def uniform(seed: int, step: int) -> float:
    """The uniform number in [0, 1) of a request's token number `step` (Philox, keyed by the seed)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step])).random())


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generated: Sequence[int],
    seeds: Sequence[int],
    states: Sequence[RowState | None] = (),
) -> list[int | None]:
    """One token id per row of `logits` `[rows, vocab]`; None where the row holds NaN or inf, or allows nothing.

    Rows whose parameters need a state (`SamplingParams.remembers`) have one in `states`, which has followed their
    tokens. There they find the logprobs of the token, where they are wanted.
    """
    if logits.device.type != "cpu":
        from qllm.executor.sampling.device_sampling import sample_on_device  # here: it needs what this file defines

        return sample_on_device(logits, params, generated, seeds, states)
    allowing = forbid_stops(logits, params, generated)
    changed = [i for i, state in enumerate(states) if state is not None and state.changes]
    if not changed:
        tokens = _choose(allowing, params, generated, seeds)
    else:
        plain = [i for i, state in enumerate(states) if state is None or not state.changes]
        shifted = _changed(allowing, changed, params, generated, states)
        tokens = [None] * len(params)
        for rows, values in ((plain, allowing[plain]), (changed, shifted)):
            chosen = _choose(values, picked(params, rows), picked(generated, rows), picked(seeds, rows))
            for i, token in zip(rows, chosen, strict=True):
                tokens[i] = token
    for i, state in enumerate(states):
        if state is not None and state.top is not None:
            token = tokens[i]
            state.logprobs = None if token is None else logprobs_of(logits[i], token, state.top)
    return tokens


def picked(values: Sequence[T], rows: Iterable[int]) -> list[T]:
    """Those of these rows."""
    return [values[i] for i in rows]


def _changed(
    logits: torch.Tensor,
    rows: list[int],
    params: Sequence[SamplingParams],
    generated: Sequence[int],
    states: Sequence[RowState | None],
) -> torch.Tensor:
    """Copies of these rows, float32, with penalties and biases, and without what a grammar does not allow."""
    copies = logits[rows].float()
    vocab = copies.shape[1]
    for i, row in zip(rows, copies.numpy(), strict=True):
        state = states[i]
        if state is not None and state.shifts is not None:
            state.shifts.apply(row)
        if state is not None and state.matcher is not None:
            bits = state.allowed(params[i], generated[i], vocab)
            row[np.unpackbits(bits, count=vocab, bitorder="little") == 0] = -np.inf
    return copies


def _choose(
    logits: torch.Tensor, params: Sequence[SamplingParams], generated: Sequence[int], seeds: Sequence[int]
) -> list[int | None]:
    tokens: list[int | None] = [None] * len(params)
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    if greedy:
        rows = logits if len(greedy) == len(params) else logits[greedy]
        best, ids = largest_of(rows)
        for i, token, finite in zip(greedy, ids.tolist(), best.isfinite().tolist(), strict=True):
            tokens[i] = token if finite else None
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        numbers = [uniform(seeds[i], generated[i]) for i in drawn]
        rows = logits if len(drawn) == len(params) else logits[drawn]
        for i, token in zip(drawn, draw(rows, [params[i] for i in drawn], numbers), strict=True):
            tokens[i] = token
    return tokens


def forbids(p: SamplingParams, generated: int) -> bool:
    """Whether no stop token may be chosen now; with a grammar, that sees to it (`RowState.allowed`)."""
    return generated < p.min_tokens and bool(p.stop) and p.grammar is None


def forbid_stops(logits: torch.Tensor, params: Sequence[SamplingParams], generated: Sequence[int]) -> torch.Tensor:
    """`logits` with the stop tokens of requests below their `min_tokens` at -inf; a copy where there are any."""
    below = [(i, p) for i, (p, n) in enumerate(zip(params, generated, strict=True)) if forbids(p, n)]
    if not below:
        return logits
    logits = logits.clone()
    for i, p in below:
        logits[i, sorted(p.stop)] = float("-inf")
    return logits


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> list[int | None]:
    """Token ids drawn at these numbers, after temperature, min-p, top-k, top-p; None where nothing can be drawn."""
    # top-p keeps the fewest most likely tokens whose probability reaches p, the one that reaches it included.
    few = [i for i, p in enumerate(params) if 0 < p.top_k <= min(FEW, logits.shape[1])]
    tokens: dict[int, int | None] = {}
    if few:
        rows = logits if len(few) == len(params) else logits[few]
        found = _among_largest(rows, [params[i] for i in few], np.array([numbers[i] for i in few]))
        tokens = {i: token for i, (token, known) in zip(few, found, strict=True) if known}
    for i in range(len(params)):
        if i not in tokens:
            tokens[i] = _among_all(logits[i].float(), params[i], numbers[i])
    return [tokens[i] for i in range(len(params))]


def _among_largest(
    rows: torch.Tensor, params: Sequence[SamplingParams], numbers: np.ndarray
) -> list[tuple[int | None, bool]]:
    """(token, whether it is known) from each row's largest logits: not known where more tie with the k-th than these.

    Every row has a `top_k`.
    """
    n, vocab = rows.shape
    top_k = np.array([p.top_k for p in params])
    width = min(vocab, TIES + int(top_k.max()))
    largest, of = largest_k(rows.float(), width)
    values, ids = largest.double().numpy(), of.numpy()
    with np.errstate(invalid="ignore"):  # a row of inf or NaN comes out with a total that is neither
        weights = np.exp((values - values[:, :1]) / np.array([[p.temperature] for p in params]))
        min_p = np.array([p.min_p for p in params])
        if min_p.any():
            weights[weights < min_p[:, None]] = 0.0
    each = np.arange(n)
    threshold = values[each, top_k - 1]
    known = (width == vocab) | ~(values[:, -1] >= threshold)
    weights[values < threshold[:, None]] = 0.0
    cumulative = weights.cumsum(axis=1)
    top_p = np.array([p.top_p for p in params])
    reached = (cumulative < (top_p * cumulative[:, -1])[:, None]).sum(axis=1)
    nucleus = values[each, np.minimum(reached, width - 1)]
    weights[values < np.where(top_p < 1, np.maximum(threshold, nucleus), threshold)[:, None]] = 0.0
    order = ids.argsort(axis=1)
    ids, cumulative = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1).cumsum(axis=1)
    total = cumulative[:, -1]
    at = (cumulative <= (numbers * total)[:, None]).sum(axis=1)
    last = (cumulative < total[:, None]).sum(axis=1)  # rounding must not reach beyond the last token kept
    chosen = ids[each, np.minimum(at, np.minimum(last, width - 1))].tolist()
    usable = np.isfinite(total) & (total > 0)
    return [
        (token if fine else None, bool(sure or not fine))
        for token, fine, sure in zip(chosen, usable.tolist(), known.tolist(), strict=True)
    ]


def _among_all(row: torch.Tensor, p: SamplingParams, number: float) -> int | None:
    """Draw from a whole row of logits, float32 `[vocab]`. Its bits depend on nothing but the row."""
    weights = ((row - row.max()) / p.temperature).exp()  # probabilities but for their common factor
    if p.min_p > 0:
        weights = weights.where(weights >= p.min_p, 0.0)
    if 0 < p.top_k < len(row):
        weights = weights.where(row >= row.topk(p.top_k).values[-1], 0.0)
    sums = in_blocks(weights).sum(-1).double().cumsum(0)
    tail = weights[len(sums) * BLOCK :].double()
    total = float(sums[-1] if len(sums) else 0.0) + float(tail.sum())
    if not 0 < total < math.inf:
        return None
    if p.top_p < 1:
        # Tokens of less than this lie beyond the nucleus: all of them together have not more than 1 - p.
        ids = (weights >= (1 - p.top_p) * total / len(row)).nonzero()[:, 0]
        kept = weights[ids]
        falling = rising(kept).flip(0)
        reached = int(torch.searchsorted(falling.cumsum(0, dtype=torch.float64), p.top_p * total))
        most_likely = kept >= falling[min(reached, len(falling) - 1)]
        ids, cumulative = ids[most_likely], kept[most_likely].cumsum(0, dtype=torch.float64)
        return int(ids[_place(cumulative, number * float(cumulative[-1]))])
    block = int(torch.searchsorted(sums, number * total, right=True))
    before = float(sums[block - 1]) if block else 0.0
    first = block * BLOCK
    inside = weights[first : first + BLOCK].double() if block < len(sums) else tail
    at = first + _place(inside.cumsum(0), number * total - before) if len(inside) else len(row)
    return at if at < len(row) and weights[at] > 0 else int(weights.nonzero()[-1])


def _place(cumulative: torch.Tensor, target: float) -> int:
    """The first place where the cumulative weights exceed `target`; rounding must not reach beyond the last."""
    last = int(torch.searchsorted(cumulative, cumulative[-1]))
    return min(int(torch.searchsorted(cumulative, target, right=True)), last)
