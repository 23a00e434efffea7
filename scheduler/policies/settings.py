"""Settings of policies: what is allowed."""

from __future__ import annotations

from math import inf
from typing import Any

from qllm.scheduler.request import UnknownPolicy


def boolean(policy: str, key: str, value: Any) -> bool:
    """`value` if it is true or false. Raises UnknownPolicy."""
    if not isinstance(value, bool):
        raise UnknownPolicy(f"{policy}: {key} is {value!r:.80}, must be true or false")
    return value


def at_least(least: float, policy: str, key: str, value: Any) -> Any:
    """`value` if it is a number of at least `least`. Raises UnknownPolicy."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise UnknownPolicy(f"{policy}: {key} is {value!r:.80}, must be a number of at least {least}")
    return value


def share(policy: str, key: str, value: Any) -> Any:
    """`value` if it is a number of at least 0 and below 1. Raises UnknownPolicy."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UnknownPolicy(f"{policy}: {key} is {value!r:.80}, must be a number of at least 0 and below 1")
    return value


def whole(least: int, policy: str, key: str, value: Any) -> Any:
    """`value` if it is a whole number of at least `least`. Raises UnknownPolicy."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UnknownPolicy(f"{policy}: {key} is {value!r:.80}, must be a whole number of at least {least}")
    return value


def tenant_weights(policy: str, given: object) -> dict[str, float]:
    """`given` if it is a mapping of tenants to numbers above 0. Raises UnknownPolicy."""
    if not isinstance(given, dict):
        raise UnknownPolicy(f"{policy}: weights is {given!r:.80}, must be a mapping of tenants to numbers above 0")
    for tenant, weight in given.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < inf:
            raise UnknownPolicy(f"{policy}: weights.{tenant} is {weight!r:.80}, must be a number above 0")
    return {str(tenant): float(weight) for tenant, weight in given.items()}
