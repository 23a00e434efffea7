"""What comes from a client, checked by type and value before it reaches the engine's thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qllm.executor.errors import ExecutorError, KVMemoryError, RequestError, SamplingError
from qllm.executor.graphs.runner import GRAPHS
from qllm.executor.sampling.params import SamplingParams, is_whole
from qllm.scheduler import Limits, Policy, SchedulerError


def check_settings(policy: Any, limits: Any, kv_memory: Any, max_step: Any, seed: Any, graphs: Any) -> None:
    """Raise a typed error for an argument of Engine that is of another type than allowed, or out of its range."""
    if not isinstance(policy, str | Policy):
        raise SchedulerError(f"policy is {policy!r:.80}; allowed: the name of a policy, or a Policy")
    if limits is not None and not isinstance(limits, Limits):
        raise SchedulerError(f"limits is {limits!r:.80}; allowed: None, or Limits")
    if kv_memory is not None and (not is_whole(kv_memory) or not 1 <= kv_memory < 1 << 62):
        raise KVMemoryError(f"kv_memory is {kv_memory!r:.80}; allowed: None, or a whole number of bytes")
    if isinstance(max_step, bool) or not isinstance(max_step, int | float) or not 1e-9 <= max_step <= 1e9:
        raise ExecutorError(f"max_step is {max_step!r:.80}; allowed: seconds from 1e-9 to 1e9")
    if seed is not None and (not is_whole(seed) or not 0 <= seed < 2**64):
        raise SamplingError(f"seed is {seed!r:.80}; allowed: None, or a whole number between 0 and 2**64 - 1")
    if graphs not in GRAPHS:
        raise ExecutorError(f"graphs is {graphs!r:.80}; allowed: {', '.join(GRAPHS)}")


def token_ids(name: str, given: Any, vocabulary: int) -> list[int]:
    """Token ids from an iterable, a tensor, or what a tokenizer or a chat template returns. Raises RequestError."""
    if isinstance(given, Mapping) and "input_ids" in given:
        given = given["input_ids"]
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise RequestError(f"{name} is {given!r:.80}; allowed: token ids")
    tokens = list(given)
    if len(tokens) == 1 and isinstance(tokens[0], list):  # a batch of one
        tokens = tokens[0]
    # The engine waits while a client's thread is in here: the usual case is to be quick for long prompts.
    if set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocabulary:
        return list(tokens)
    for token in tokens:
        if not is_whole(token) or not 0 <= token < vocabulary:
            raise RequestError(f"{name} holds {token!r:.80}; allowed: token ids from 0 to {vocabulary - 1}")
    return [int(token) for token in tokens]


def check_request(
    tokens: list[int], max_new_tokens: Any, priority: Any, sampling: SamplingParams, max_positions: int | None
) -> None:
    """Raise RequestError for a request that the model or the scheduler cannot take."""
    if not tokens:
        raise RequestError("prompt is empty; allowed: at least one token id")
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens!r:.80}; allowed: a whole number, 1 or more")
    if not is_whole(priority):
        raise RequestError(f"priority is {priority!r:.80}; allowed: a whole number, lower is more urgent")
    if sampling.min_tokens > max_new_tokens:
        raise RequestError(
            f"min_tokens is {sampling.min_tokens!r:.80}; allowed: at most max_new_tokens, {max_new_tokens!r:.80}"
        )
    if max_positions is not None and len(tokens) + max_new_tokens > max_positions:
        raise RequestError(
            f"{len(tokens)} prompt tokens and {max_new_tokens!r:.80} new ones; allowed: {max_positions} together, as "
            "the model's positions"
        )
