"""Arguments of an engine's face, by type and value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from qllm.executor.errors import RequestError
from qllm.executor.sampling.params import SamplingParams, is_whole

MOST_ID = 256  # characters of a request's own id, or of a tenant


def check_request(
    tokens: list[int], max_new_tokens: Any, priority: Any, sampling: SamplingParams, max_positions: int | None
) -> None:
    """Raise RequestError for a request that the model or the scheduler cannot take."""
    if not tokens:
        raise RequestError("prompt is empty; allowed: at least one token id")
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens!r:.80}; allowed: a whole number, 1 or more")
    check_priority(priority)
    if sampling.min_tokens > max_new_tokens:
        raise RequestError(
            f"min_tokens is {sampling.min_tokens!r:.80}; allowed: at most max_new_tokens, {max_new_tokens!r:.80}"
        )
    if max_positions is not None and len(tokens) + max_new_tokens > max_positions:
        raise RequestError(
            f"{len(tokens)} prompt tokens and {max_new_tokens!r:.80} new ones; allowed: {max_positions} together, as "
            "the model's positions"
        )


def check_priority(priority: Any) -> None:
    """Raise RequestError for what is no priority."""
    if not is_whole(priority):
        raise RequestError(f"priority is {priority!r:.80}; allowed: a whole number, lower is more urgent")


def check_id(request_id: Any) -> None:
    """Raise RequestError for what is no id: it stands in log lines and errors."""
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MOST_ID or not request_id.isprintable():
        raise RequestError(f"request_id is {request_id!r:.80}; allowed: 1 to {MOST_ID} printable characters")


def strings(name: str, given: Any) -> list[str]:
    """One string, or several. Raises RequestError."""
    found: list[Any] = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    for string in found:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} holds {string!r:.80}; allowed: strings that are not empty")
    return found


def check_seconds(name: str, value: Any, *, zero: bool) -> None:
    """Raise RequestError unless `value` is None or a number of seconds; whether it may be 0."""
    least = 0 if zero else 1e-9
    fits = isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= 1e9
    if value is not None and not fits:
        raise RequestError(f"{name} is {value!r:.80}; allowed: None, or seconds from {least:g} to 1e9")


def wants_of(
    max_ttft: float | None, max_tpot: float | None, tenant: str, tags: Mapping[str, str] | None
) -> dict[str, Any]:
    """What a scheduler is told of them. Raises RequestError for what is no number of seconds, or no name."""
    check_seconds("max_ttft", max_ttft, zero=False)
    check_seconds("max_tpot", max_tpot, zero=False)
    if not isinstance(tenant, str) or len(tenant) > MOST_ID:
        raise RequestError(f"tenant is {tenant!r:.80}; allowed: text of up to {MOST_ID} characters")
    found: dict[str, Any] = {"tenant": tenant} if tenant else {}
    if tags is not None:
        if not isinstance(tags, Mapping) or not all(isinstance(part, str) for pair in tags.items() for part in pair):
            raise RequestError(f"tags is {tags!r:.80}; allowed: None, or a mapping of texts to texts")
        found["tags"] = dict(tags)
    for name, seconds in (("max_ttft_s", max_ttft), ("max_tpot_s", max_tpot)):
        if seconds is not None:
            found[name] = float(seconds)
    return found
