"""Which prompts begin alike, by blocks of tokens, for a prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The blocks that each request's context begins with, by number.

    Two requests whose numbers agree up to a block have the same tokens up to its end. A request's blocks cover whole
    blocks of its prompt, or of its prompt and output, where it is known what its answer is.

    Attributes:
        ids: The numbers, request by request, int64[m], 0 or more.
        counts: How many of them each request has, int64[n].
        block_tokens: Tokens in a block, at least 1.

    Raises:
        ValueError: A column breaks these rules.
    """

    ids: np.ndarray
    counts: np.ndarray
    block_tokens: int
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids, counts = (np.asarray(column, dtype=np.int64) for column in (self.ids, self.counts))
        if self.block_tokens < 1 or (len(ids) and ids.min() < 0):
            raise ValueError(f"block_tokens is {self.block_tokens}, must be at least 1, and ids at least 0")
        if (len(counts) and counts.min() < 0) or counts.sum() != len(ids):
            raise ValueError(f"counts add up to {counts.sum()}, must be 0 or more and add up to the {len(ids)} ids")
        for name, value in {"ids": ids, "counts": counts, "_ends": np.cumsum(counts)}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prefixes):
            return NotImplemented
        mine, others = self.chained(), other.chained()
        return self.block_tokens == other.block_tokens and all(map(np.array_equal, mine, others))

    def __getitem__(self, which: slice | np.ndarray) -> Prefixes:
        """Those of some of the requests, in that order."""
        rows = np.arange(len(self))[which]
        counts = self.counts[rows]
        first = np.repeat(self._ends[rows] - counts, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Prefixes(self.ids[first + within], counts, self.block_tokens)

    def of(self, i: int) -> list[int]:
        """The numbers of request `i`."""
        end = self._ends[i]
        found: list[int] = self.ids[end - self.counts[i] : end].tolist()
        return found

    def chained(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers that stand for all from the start to the end of the block, whatever `ids` stand for; and `counts`.

        They count from 0 by the length of what they stand for, then by the order of `ids`.
        """
        start = self._ends - self.counts
        chained = np.empty_like(self.ids)
        rows, before, known = np.arange(len(self)), np.zeros(len(self), dtype=np.int64), 0
        ids = np.unique(self.ids, return_inverse=True)[1].astype(np.int64)  # small, so that pairs fit
        most = int(ids.max(initial=0)) + 1
        for depth in range(int(self.counts.max(initial=0))):
            going = self.counts[rows] > depth
            rows, before = rows[going], before[going]
            at = start[rows] + depth
            found, pair = np.unique(before * most + ids[at], return_inverse=True)
            chained[at] = before = known + pair
            known += len(found)
        return chained, self.counts

    def keys(self, kv_block: int) -> tuple[int, Callable[[int], list[int]]]:
        """Keys for the prefix cache of a GPU whose KV blocks hold `kv_block` tokens.

        Returns:
            KV blocks to a unit, the least that hold whole blocks of the trace; and a function from a request to the
            keys of its units (see `qllm.scheduler.Request`).
        """
        unit = lcm(self.block_tokens, kv_block)
        chained, counts = self.chained()
        step, ends = unit // self.block_tokens, self._ends.tolist()
        starts = (self._ends - counts).tolist()

        def of(i: int) -> list[int]:
            found: list[int] = chained[starts[i] + step - 1 : ends[i] : step].tolist()
            return found

        return unit // kv_block, of

    def cached_tokens(self, prompt: np.ndarray) -> np.ndarray:
        """Tokens of each prompt that a cache without limit would hold of the requests before it, int64[n].

        `prompt` are the prompts' tokens, int64[n].
        """
        chained, _ = self.chained()
        first = np.zeros(len(chained), dtype=bool)
        first[np.unique(chained, return_index=True)[1]] = True  # where a beginning comes for the first time
        known = np.cumsum(~first)
        padded = np.concatenate([[0], known])
        blocks = padded[self._ends] - padded[self._ends - self.counts]
        held: np.ndarray = np.minimum(blocks * self.block_tokens, prompt)
        return held


def growing(tokens: np.ndarray, sessions: np.ndarray, block_tokens: int) -> Prefixes:
    """Prefixes of requests each of which begins with all that was said in its session before.

    Args:
        tokens: Prompt and output of each request, int64[n], growing within a session.
        sessions: Whose each is, int64[n], requests of a session one after the other.
        block_tokens: Tokens in a block.
    """
    counts = tokens // block_tokens
    first = np.unique(sessions, return_index=True)[1]
    last = np.append(first[1:], len(sessions)) - 1
    base = np.cumsum(counts[last]) - counts[last]
    offset = np.repeat(base, last - first + 1)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Prefixes(np.repeat(offset, counts) + within, counts, block_tokens)


def describe_prefixes(prefixes: Prefixes | None, prompt: np.ndarray) -> dict[str, Any]:
    """What a prefix cache without limit would save, ready for JSON; None: they could not be made sense of."""
    if prefixes is None:
        return {"block_tokens": None, "cached_share": None}
    share = float(prefixes.cached_tokens(prompt).sum() / prompt.sum())
    return {"block_tokens": prefixes.block_tokens, "cached_share": share}


def prefixes_in_words(described: dict[str, Any]) -> str:
    """The same in words."""
    share = described["cached_share"]
    if share is None:
        return "hash_ids (prompts that begin alike) cannot be used: how many ids a prompt has fits no block size"
    return (
        f"hash_ids (prompts that begin alike) in blocks of {described['block_tokens']} tokens; a prefix cache without "
        f"limit would hold {100 * share:.1f} % of the prompt tokens"
    )
