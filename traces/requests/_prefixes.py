"""Which prompts begin alike, as traces tell it: hash_ids, one a block of the prompt (Mooncake's, Qwen-Bailian's)."""

from __future__ import annotations

from collections import defaultdict
from itertools import count

import numpy as np

from qllm.traces.prefixes import Prefixes

USUAL_BLOCK = {"mooncake": 512, "bailian": 16, "jsonl": 16}  # tokens, as the formats say
BLOCK_SIZES = tuple(2**i for i in range(13))


class HashIds:
    """The ids of each prompt, as numbers from 0 in order of appearance."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._known: defaultdict[int | str, int] = defaultdict(count().__next__)

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, ids: list[int | str]) -> None:
        """The ids of the next request."""
        self._rows.append(np.fromiter(map(self._known.__getitem__, ids), np.int64, len(ids)))

    def prefixes(self, order: np.ndarray, prompt: np.ndarray, block_tokens: int | None, usual: int) -> Prefixes | None:
        """The whole blocks of each prompt; None where no block size explains how many ids a prompt has.

        Args:
            order: The requests' order.
            prompt: Tokens of their prompts, in that order.
            block_tokens: Tokens in a block; None: `usual` where that explains it, or else what does.
            usual: Tokens in a block, as a rule.
        """
        rows = [self._rows[i] for i in order.tolist()]
        counts = np.array([len(ids) for ids in rows], dtype=np.int64)
        if block_tokens is None:
            mine, blocks = prompt[counts > 0], counts[counts > 0]
            sizes = (usual, *BLOCK_SIZES)
            block_tokens = next((size for size in sizes if np.array_equal(-(-mine // size), blocks)), None)
            if block_tokens is None:
                return None
            counts = np.minimum(counts, prompt // block_tokens)  # the last one may be a part of a block
        ids = np.concatenate([ids[:n] for ids, n in zip(rows, counts.tolist(), strict=True)])
        return Prefixes(ids, counts, block_tokens)
