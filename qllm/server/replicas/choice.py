"""Which replica a request goes to: the one where it waits for the least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What one replica says of itself.

    Attributes:
        name: of its model.
        alive: whether its engine serves.
        waiting_tokens: of prompts whose answers have no first token yet, by priority; lower is more urgent.
        kv_used: share of its KV blocks in use.
    """

    name: str = ""
    alive: bool = True
    waiting_tokens: Mapping[int, int] = field(default_factory=dict)
    kv_used: float = 0.0


@dataclass(eq=False)
class Sent:
    """A request that a replica was sent and that has not ended.

    Attributes:
        priority: of its class.
        tokens: about so many has its prompt.
        reported: whether the replica's last report counts it.
    """

    priority: int
    tokens: int
    reported: bool = False


def blocking(report: Report, open_: Sequence[Sent], priority: int) -> tuple[float, ...]:
    """What a request of that priority would meet at a replica; the smaller, the better.

    It waits for the prompts that are as urgent as it is, and shares its passes with the answers that are. What is less
    urgent gives way at its next preemption point, so that decides only between replicas that are alike otherwise. For
    a request of the least urgent class everything is as urgent, and so it goes where the fewest tokens wait.
    """
    levels = [one.priority for one in open_]
    known = {one.priority for one in open_ if one.reported}  # of others the report is out of date: they have ended
    tokens = [(level, many) for level, many in report.waiting_tokens.items() if level in known]
    tokens += [(one.priority, one.tokens) for one in open_ if not one.reported]
    return (
        sum(many for level, many in tokens if level <= priority),
        sum(level <= priority for level in levels),
        sum(level > priority for level in levels),
        sum(many for level, many in tokens if level > priority),
        report.kv_used,
    )


def ranked(replicas: Mapping[str, tuple[Report, Sequence[Sent]]], priority: int) -> list[str]:
    """The replicas that serve, the best one for a request of that priority first; of equal ones, the first given."""
    return sorted(
        (name for name, (report, _) in replicas.items() if report.alive),
        key=lambda name: blocking(*replicas[name], priority),
    )
