"""The logarithms of probabilities that a client is told beside its tokens: of the model's own distribution."""

from __future__ import annotations

from typing import NamedTuple


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities where one token was chosen, before anything changes the model's logits.

    (As vLLM reports them by default, but for a grammar: vLLM's are those of the tokens that it allows.)

    Attributes:
        chosen: the chosen token's.
        top: token ids with theirs, the most likely first; as many as were asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]
