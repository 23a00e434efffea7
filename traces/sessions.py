"""Requests that follow others: a client sends the next one when the last has ended and it has thought for a while."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Sessions:
    """Which requests of a trace follow which. Such a request arrives late, whatever the trace says of its arrival.

    Attributes:
        follows: The request that each one follows, int64[n]: an index before its own, or -1 for none.
        think_s: Seconds from that one's end to the arrival of this one, float64[n], finite and >= 0; 0 where it follows
            none.

    Raises:
        ValueError: A column breaks these rules.
    """

    follows: np.ndarray
    think_s: np.ndarray

    def __post_init__(self) -> None:
        follows = np.asarray(self.follows, dtype=np.int64)
        think = np.asarray(self.think_s, dtype=np.float64)
        if follows.ndim != 1 or not ((follows >= -1) & (follows < np.arange(len(follows)))).all():
            raise ValueError("follows: must hold indices of requests before, or -1")
        if think.shape != follows.shape or not ((think >= 0) & (think < np.inf)).all():
            raise ValueError(f"think_s: must hold {len(follows)} finite numbers >= 0 (seconds)")
        object.__setattr__(self, "follows", follows)
        object.__setattr__(self, "think_s", np.where(follows < 0, 0.0, think))

    def __len__(self) -> int:
        return len(self.follows)

    def __getitem__(self, first: slice) -> Sessions:
        """Those of the first requests."""
        return Sessions(self.follows[first], self.think_s[first])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sessions):
            return NotImplemented
        return np.array_equal(self.follows, other.follows) and np.array_equal(self.think_s, other.think_s)

    def describe(self) -> dict[str, float]:
        """How many requests follow none, how many another, and the median of their think times; ready for JSON."""
        think_s = self.think_s[self.follows >= 0]
        return {
            "first": len(self) - len(think_s),
            "following": len(think_s),
            "think_s_p50": float(np.median(think_s)) if len(think_s) else 0.0,
        }


def closed_loop(clients: int, think_s: np.ndarray) -> Sessions:
    """`clients` clients that share the requests in turn, each with one request in the system at most.

    Args:
        clients: At least 1. Client c sends the requests c, c + clients, c + 2 clients and so on.
        think_s: Seconds before each request but a client's first, float64[n].

    Raises:
        ValueError: There is no client, or a think time breaks the rules of `Sessions`.
    """
    if clients < 1:
        raise ValueError(f"clients is {clients}, must be at least 1")
    return Sessions(np.maximum(np.arange(len(think_s)) - clients, -1), think_s)


def turns(many: int, think_s: np.ndarray) -> Sessions:
    """Conversations of `many` requests, one after the other in the trace; the last one may have fewer.

    Args:
        many: At least 1.
        think_s: Seconds before each request but a conversation's first, float64[n].

    Raises:
        ValueError: As `closed_loop` does.
    """
    if many < 1:
        raise ValueError(f"turns is {many}, must be at least 1")
    number = np.arange(len(think_s))
    return Sessions(np.where(number % many, number - 1, -1), think_s)
