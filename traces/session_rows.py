"""Who follows whom, as files tell it: rows that name another row (our own formats), or chats (Qwen-Bailian's)."""

from __future__ import annotations

from typing import Any

import numpy as np

from qllm.traces.sessions import Sessions

FOLLOWS = "follows"
THINK = "think_s"
SESSION_COLUMNS = (FOLLOWS, THINK)
FOLLOWS_ALLOWED = "the number of a row before its own, from 0 on"
THINK_ALLOWED = "a number >= 0 (seconds), where follows says whom it follows"
FOLLOWING_FORMATS = ("bailian", "csv", "jsonl")


class SessionRows:
    """What the rows of a file say, in its order; those that were left out are none of them."""

    def __init__(self) -> None:
        self.names: list[Any] = []  # of each row, what others call it: its number in the file, or its chat
        self.follows: list[Any] = []  # whom each follows, None: nobody
        self.think_s: list[float | None] = []  # None: from its arrivals
        self.lines: list[int] = []

    def add(self, name: Any, follows: Any, think_s: float | None, line: int) -> None:
        """The next request's."""
        self.names.append(name)
        self.follows.append(follows)
        self.think_s.append(think_s)
        self.lines.append(line)

    def sessions(self, arrival: np.ndarray, order: np.ndarray) -> Sessions | None:
        """The same by arrival; None where nobody follows another.

        It follows the last row of that name before its own. Where there is none, because it was left out or is none of
        this part of a trace, it comes by itself.

        Args:
            arrival: Of the requests, float64[n] in seconds, in the file's order.
            order: That of the arrivals.

        Raises:
            ValueError: A request arrives before the one that it follows.
        """
        at: dict[Any, int] = {}
        before = np.full(len(order), -1, dtype=np.int64)
        for i, (name, follows) in enumerate(zip(self.names, self.follows, strict=True)):
            if follows is not None:
                before[i] = at.get(follows, -1)
            at[name] = i
        if (before < 0).all():
            return None
        gap = np.where(before < 0, 0.0, arrival - arrival[before])
        if (gap < 0).any():
            i = int(np.argmax(gap < 0))
            raise ValueError(f"line {self.lines[i]}: arrives before the request that it follows")
        position = np.empty(len(order), dtype=np.int64)
        position[order] = np.arange(len(order))
        think_s = np.array([gap[i] if own is None else own for i, own in enumerate(self.think_s)], dtype=np.float64)
        return Sessions(np.where(before < 0, -1, position[before])[order], think_s[order])


def row_problem(row: int, follows: int | None, think_s: float | None) -> str | None:
    """Why row `row` cannot follow row `follows` after `think_s` seconds, of which None says nothing; None if it can."""
    if follows is not None and follows >= row:
        return f"{FOLLOWS} is {follows}, must be {FOLLOWS_ALLOWED} ({row})"
    if think_s is not None and follows is None:
        return f"{THINK} is {think_s:g}, must be {THINK_ALLOWED}"
    return None
