"""Which prompts begin alike: the hash_ids of Mooncake's and Qwen-Bailian's traces, an id per block of the prompt."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import Any

import numpy as np

USUAL_BLOCK = {"mooncake": 512, "bailian": 16}  # tokens, as the formats say
BLOCK_SIZES = tuple(2**i for i in range(13))


class Prefixes:
    """The blocks of each prompt, as numbers from 0 in order of appearance."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self._known: defaultdict[int | str, int] = defaultdict(count().__next__)

    def add(self, ids: list[int | str]) -> None:
        """The ids of the next request."""
        self.blocks.append(np.fromiter(map(self._known.__getitem__, ids), np.int64, len(ids)))

    def sorted(self, order: np.ndarray) -> Prefixes:
        """The same, the requests in that order."""
        other = Prefixes()
        other.blocks = [self.blocks[i] for i in order.tolist()]
        other._known = self._known
        return other

    def block_tokens(self, prompt: np.ndarray, usual: int) -> int | None:
        """Tokens in a block: `usual` where that explains how many ids each prompt has, or else what does, or None."""
        blocks = np.array([len(ids) for ids in self.blocks])
        prompt, blocks = prompt[blocks > 0], blocks[blocks > 0]
        return next((size for size in (usual, *BLOCK_SIZES) if np.array_equal(-(-prompt // size), blocks)), None)

    def cached_tokens(self, prompt: np.ndarray, block_tokens: int) -> np.ndarray:
        """Tokens of each prompt, in this order, that a cache of all earlier prompts would hold: int64[n]."""
        seen = np.zeros(len(self._known), dtype=bool)
        cached = np.zeros(len(prompt), dtype=np.int64)
        for i, ids in enumerate(self.blocks):
            new = np.flatnonzero(~seen[ids])
            cached[i] = (new[0] if len(new) else len(ids)) * block_tokens
            seen[ids] = True
        held: np.ndarray = np.minimum(cached, prompt)
        return held

    def describe(self, prompt: np.ndarray, usual: int) -> dict[str, Any] | None:
        """What a prefix cache without limit would save, ready for JSON; None where no request has an id."""
        if not self._known:
            return None
        block_tokens = self.block_tokens(prompt, usual)
        share = None
        if block_tokens is not None:
            share = float(self.cached_tokens(prompt, block_tokens).mean() / prompt.mean())
        return {"used": False, "block_tokens": block_tokens, "cached_share": share}


def prefixes_in_words(prefixes: dict[str, Any]) -> str:
    """The same in words."""
    share = prefixes["cached_share"]
    if share is None:
        return "hash_ids (prompts that begin alike) are not used; how many ids a prompt has fits no block size"
    return (
        f"hash_ids (prompts that begin alike) are not used: every prompt is computed whole; a prefix cache without "
        f"limit would hold {100 * share:.1f} % of the prompt tokens (blocks of {prefixes['block_tokens']})"
    )
