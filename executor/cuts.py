"""How a pass is cut into steps: from linear step times and the longest step allowed.

A cut depends on the batch and on the layer's routing only, never on the clock or on who waits: the same pass is always
cut in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cuts:
    """Step times (seconds) and the longest step allowed.

    One expert over m rows takes about `expert_base + m * expert_row`; attention takes `cell` per query row and key.
    An expert is never cut, so a single one may exceed `max_step`.
    """

    max_step: float = 0.01
    expert_base: float = 1e-3
    expert_row: float = 1e-5
    cell: float = 2e-8

    @property
    def cells(self) -> int:
        """Query rows times keys in one group of query blocks."""
        return max(1, int(self.max_step / self.cell))

    def expert_groups(self, experts: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """`experts` in order, cut into groups of at most `max_step` each; `counts[e]` rows go to expert e."""
        groups: list[list[int]] = []
        spent = 0.0
        for e in experts:
            cost = self.expert_base + counts[e] * self.expert_row
            if not groups or spent + cost > self.max_step:
                groups.append([])
                spent = 0.0
            groups[-1].append(e)
            spent += cost
        return groups


#: A point before every expert and every query row or two: for tests.
FINEST = Cuts(max_step=1e-9, expert_base=1.0, expert_row=1.0, cell=1.0)
