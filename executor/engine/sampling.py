"""Sampling: one batch of logits in, one token per row out.

Greedy rows take the largest logit. The others draw by inverse transform from the filtered distribution, with one
uniform number that depends only on the request's seed and on how many tokens it has generated, so a request draws the
same tokens whoever shares its batches, and again after it was recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qllm.executor.errors import SamplingError


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: draw from so many most likely tokens; 0 for all.
        top_p: draw from the most likely tokens that together have this probability; above 0, at most 1.
        seed: of the draws; None for one of the engine's own.
        min_tokens: tokens before which no stop token is chosen.
        stop: token ids that end the request.

    Raises:
        SamplingError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_tokens: int = 0
    stop: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _require(
            "temperature", self.temperature, math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"
        )
        _require("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        _require("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more")


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise SamplingError(f"{name} is {value!r}; allowed: {allowed}")


def uniform(seed: int, step: int) -> float:
    """The uniform number in [0, 1) of a request's token number `step` (Philox, keyed by the seed)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step])).random())


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], generated: Sequence[int], seeds: Sequence[int]
) -> list[int]:
    """Choose one token for each row.

    Args:
        logits: `[rows, vocab]`.
        params: of each row's request.
        generated: tokens that each row's request has generated so far.
        seeds: of each row's request.

    Returns:
        Token ids, one a row.
    """
    logits = forbid_stops(logits, params, generated)
    tokens = logits.argmax(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        numbers = [uniform(seeds[i], generated[i]) for i in drawn]
        tokens[rows] = draw(logits.index_select(0, rows), [params[i] for i in drawn], numbers)
    return tokens.tolist()


def forbid_stops(logits: torch.Tensor, params: Sequence[SamplingParams], generated: Sequence[int]) -> torch.Tensor:
    """`logits` with the stop tokens of requests below their `min_tokens` at -inf; a copy where there are any."""
    rows = [i for i, (p, n) in enumerate(zip(params, generated, strict=True)) if n < p.min_tokens for _ in p.stop]
    if not rows:
        return logits
    stops = [t for p, n in zip(params, generated, strict=True) if n < p.min_tokens for t in sorted(p.stop)]
    logits = logits.clone()
    logits[rows, stops] = float("-inf")
    return logits


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> torch.Tensor:
    """Token ids `[rows]` drawn at the given uniform numbers, after temperature, top-k and top-p, in this order.

    top-p keeps the smallest set of most likely tokens whose probability reaches p, the token that reaches it included.
    """
    device, vocab = logits.device, logits.shape[-1]
    temperature = torch.tensor([p.temperature for p in params], device=device, dtype=torch.float64).unsqueeze(1)
    scaled = (logits.double() - logits.amax(-1, keepdim=True).double()) / temperature
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([min(p.top_k, vocab) or vocab for p in params], device=device).unsqueeze(1)
    values = values.masked_fill(torch.arange(vocab, device=device) >= top_k, float("-inf"))
    probability = torch.softmax(values, dim=-1)
    cumulative = probability.cumsum(-1)
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float64).unsqueeze(1)
    probability = probability.masked_fill(cumulative - probability >= top_p, 0.0)
    cumulative = probability.cumsum(-1)
    target = torch.tensor(numbers, device=device, dtype=torch.float64).unsqueeze(1) * cumulative[:, -1:]
    rank = torch.searchsorted(cumulative, target, right=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1  # rounding must not reach a token that was filtered out
    return order.gather(1, torch.minimum(rank, last)).squeeze(1)
