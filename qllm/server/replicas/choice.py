"""Which replica a request goes to: the one where it waits for the least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What one replica has to do, by priority; lower is more urgent.

    Attributes:
        name: of its model.
        alive: whether its engine serves.
        waiting_tokens: of prompts whose answers have no first token yet.
        requests: that have not ended, wherever they stand.
        kv_used: share of its KV blocks in use.
    """

    name: str = ""
    alive: bool = True
    waiting_tokens: Mapping[int, int] = field(default_factory=dict)
    requests: Mapping[int, int] = field(default_factory=dict)
    kv_used: float = 0.0


@dataclass(frozen=True, eq=False)
class Sent:
    """A request that a replica was sent and does not report yet: its priority, and about how many tokens it has."""

    priority: int
    tokens: int


def blocking(report: Report, sent: Iterable[Sent], priority: int) -> tuple[float, ...]:
    """What a request of that priority would meet at a replica; the smaller, the better.

    It waits for the prompts that are as urgent as it is, and shares its passes with the answers that are. What is less
    urgent gives way at its next preemption point, so that decides only between replicas that are alike otherwise. For
    a request of the least urgent class everything is as urgent, and so it goes where the fewest tokens wait.
    """
    sent = tuple(sent)
    tokens = [*report.waiting_tokens.items(), *((one.priority, one.tokens) for one in sent)]
    requests = [*report.requests.items(), *((one.priority, 1) for one in sent)]
    return (
        sum(many for level, many in tokens if level <= priority),
        sum(many for level, many in requests if level <= priority),
        sum(many for level, many in requests if level > priority),
        sum(many for level, many in tokens if level > priority),
        report.kv_used,
    )


def ranked(replicas: Mapping[str, tuple[Report, Iterable[Sent]]], priority: int) -> list[str]:
    """The replicas that serve, the best one for a request of that priority first; of equal ones, the first given."""
    return sorted(
        (name for name, (report, _) in replicas.items() if report.alive),
        key=lambda name: blocking(*replicas[name], priority),
    )
