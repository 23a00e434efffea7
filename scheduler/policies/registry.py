"""A policy by its name and settings."""

from __future__ import annotations

import inspect
from typing import Any

from qllm.scheduler.policies.classic import Chunked, Fcfs, Hybrid, Layer, Priority, Qllm
from qllm.scheduler.policies.slack import Slack
from qllm.scheduler.policy import Policy, checked_policy
from qllm.scheduler.request import UnknownPolicy

#: policies by the name that a configuration uses
POLICIES: dict[str, type[Policy]] = {
    "fcfs": Fcfs,
    "priority": Priority,
    "chunked": Chunked,
    "layer": Layer,
    "qllm": Qllm,
    "hybrid": Hybrid,
    "slack": Slack,
}


def make_policy(name: str, **settings: object) -> Policy:
    """Return a policy that ships, by its name in `POLICIES`.

    Args:
        name: The name that a configuration uses.
        **settings: Arguments of the policy's class.

    Raises:
        UnknownPolicy: There is no such policy or setting. The message says what is allowed.
    """
    if name not in POLICIES:
        raise UnknownPolicy(f"unknown policy {name!r}, must be one of {', '.join(POLICIES)}")
    return build_policy(POLICIES[name], name, settings)


def build_policy(cls: type[Policy], name: str, settings: dict[str, Any]) -> Policy:
    """Return `cls(**settings)`.

    Args:
        cls: The policy's class.
        name: What error messages call it.
        settings: Arguments by keyword.

    Raises:
        UnknownPolicy: `cls` has no such setting, or refuses a value; or an attribute is none that is allowed. The
            message says what is.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    allowed = [key for key, p in inspect.signature(cls).parameters.items() if p.kind in named]
    for key in settings:
        if key not in allowed:
            raise UnknownPolicy(
                f"policy {name} has no setting {key!r}, "
                + (f"only {', '.join(allowed)}" if allowed else "nor any other")
            )
    return checked_policy(cls(**settings), name)
