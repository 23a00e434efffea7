"""The logarithms of probabilities that a client is told beside its tokens: of the model's own distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qllm.executor.sampling.largest import largest_k


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities where one token was chosen, before anything changes the model's logits.

    (As vLLM reports them by default, but for a grammar: vLLM's are those of the tokens that it allows.)

    Attributes:
        chosen: the chosen token's.
        top: token ids with theirs, the most likely first; as many as were asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(row: torch.Tensor, token: int, top: int) -> Logprobs:
    """Those of `token`, and of the `top` most likely ones, from logits `[vocab]` on a CPU."""
    row = row.float()
    total = row.logsumexp(0)
    found: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = largest_k(row[None], min(top, len(row)))
        found = tuple(zip(ids[0].tolist(), (values[0] - total).tolist(), strict=True))
    return Logprobs(float(row[token] - total), found)
