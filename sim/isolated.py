"""The TTFT of a request alone on an idle device, which reports compare with."""

from __future__ import annotations

import numpy as np

from qllm.scheduler import Limits
from qllm.sim.routing import binomial
from qllm.traces.step_times.cost_model import PassCostModel


def uniform(steps: PassCostModel) -> np.ndarray:
    """Return the popularity in which all experts get the same share, float64[layers, experts]."""
    return np.full((steps.layers, steps.n_experts), 1.0 / steps.n_experts)


def isolated_ttft(
    prompt_tokens: np.ndarray, *, limits: Limits, steps: PassCostModel, popularity: np.ndarray | None = None
) -> np.ndarray:
    """Compute the TTFT of prompts alone on an idle device, expected over what their tokens may be routed to.

    A lone request of a simulation takes that long on average; what it draws itself may take a little less or more.

    Args:
        prompt_tokens: Length of each prompt, int[n].
        limits: What the GPU can hold.
        steps: How long the steps of a pass take.
        popularity: Share of tokens routed to each expert, float[layers, experts]; uniform by default.

    Returns:
        Seconds, float64[n].
    """
    share = np.minimum((uniform(steps) if popularity is None else popularity) * steps.timings.top_k, 1.0)
    lengths, back = np.unique(prompt_tokens, return_inverse=True)
    return np.array([_isolated_prefill(int(n), limits.max_batched_tokens, steps, share) for n in lengths])[back]


def _isolated_prefill(tokens: int, max_tokens: int, steps: PassCostModel, share: np.ndarray) -> float:
    shares, place = np.unique(share, return_inverse=True)
    with np.errstate(divide="ignore"):
        missed = np.log1p(-share)  # the logarithm of a token's chance to go elsewhere, -inf where all come
    done, seconds = 0, 0.0
    while done < tokens:
        n = min(tokens - done, max_tokens)
        cost = steps.cost([(None, n, done)], 0, 0, int(done + n == tokens))
        # f is no line, so f of the mean is not the mean of f: few tokens at most experts have none.
        expected = np.array([steps.experts(counts) @ chance for counts, chance in (binomial(n, q) for q in shares)])
        empty = np.exp(n * steps.by_group(cost, missed)[:, 1:])  # chance that a further group has no tokens
        seconds += steps.total(cost, float(expected[place].sum() + cost.group_launch_s * (1 - empty).sum()))
        done += n
    return seconds
