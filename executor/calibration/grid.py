"""Which passes a calibration measures."""

from __future__ import annotations

from typing import NamedTuple

ALL = 1 << 30  # experts in a group: no point between experts
PIECES = 8  # of an attention that is measured cut, where it has at least ...
LEAST_CUT = 64  # ... so many tokens
FINE_FROM = 256  # tokens of a pass from where groups of experts are small: the longer its steps, the finer it is cut
AFTER_TOKENS = 256  # of a prompt before sequences that decode ...
AFTER_CONTEXT = 512  # ... over a context of at most so many tokens


class Cell(NamedTuple):
    """One kind of pass: `sequences` of `new` tokens each over `context` cached ones, experts in groups of `group`,
    attention in `pieces` groups of query blocks.

    `hot`: all tokens go to so many experts; 0 leaves them to the model's router. `after`: tokens of the prompt that
    runs before it; 0 where none does.
    """

    sequences: int
    new: int
    context: int
    group: int = ALL
    hot: int = 0
    pieces: int = 1
    after: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.new

    @property
    def plain(self) -> Cell:
        """The same pass uncut, and after others of its kind: what this one takes longer is a difference from it."""
        return self._replace(group=ALL, pieces=1, after=0)

    @property
    def kv_tokens(self) -> int:
        """KV slots that its sequences need."""
        return self.sequences * (self.new + self.context)

    @property
    def key(self) -> str:
        """Its name in the file of finished measurements."""
        return ",".join(map(str, self))


def ladder(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `limit`: sizes that grow by half, close enough for straight lines between them."""
    sizes = {1, limit}
    size = 2
    while size < limit:
        sizes |= {size, size + size // 2}
        size *= 2
    return sorted(size for size in sizes if size <= limit)


def coarse(limit: int) -> list[int]:
    """1, 4, 16, 64, ... , `limit` / 2 and `limit`."""
    sizes = {1, max(1, limit // 2), limit}
    size = 4
    while size < limit // 2:
        sizes.add(size)
        size *= 4
    return sorted(sizes)


def doubling(limit: int) -> list[int]:
    """1, 2, 4, ... and `limit`."""
    return sorted({limit, *(1 << i for i in range(limit.bit_length()) if 1 << i <= limit)})


def contexts(limit: int) -> list[int]:
    """0, 128, 512, 2048, ... and `limit`: attention grows in proportion to the context."""
    sizes = {0, limit}
    size = 128
    while size < limit:
        sizes.add(size)
        size *= 4
    return sorted(sizes)


def cells(*, max_tokens: int, max_context: int, max_batch: int, kv_tokens: int, experts: int, top_k: int) -> list[Cell]:
    """The passes to measure for batches of up to `max_batch` sequences and `max_tokens` prompt tokens over contexts
    of up to `max_context` tokens. Those that need more than `kv_tokens` KV slots are left out."""
    found = [Cell(1, n, 0) for n in ladder(max_tokens)]
    found += [Cell(1, n, c) for c in contexts(max_context)[1:] for n in coarse(max_tokens)]
    found += [Cell(b, 1, c) for b in doubling(max_batch) for c in contexts(max_context)]
    # Between groups of experts: the same passes cut. One cut each, into many: what it costs is a small difference.
    cut = [Cell(b, 1, 0) for b in sorted({1, max(1, max_batch // 4), max_batch})]
    cut += [Cell(1, n, 0) for n in sorted({16, 64, FINE_FROM, max_tokens}) if n <= max_tokens]
    parts = [4 if one.tokens < FINE_FROM else 16 for one in cut]
    found += [one._replace(group=max(1, experts // n)) for one, n in zip(cut, parts, strict=True)]
    # Right after a prompt, which leaves nothing of theirs in the caches.
    context = max(c for c in contexts(max_context) if c <= AFTER_CONTEXT)
    found += [Cell(b, 1, context, after=min(AFTER_TOKENS, max_tokens)) for b in doubling(max_batch)]
    # Experts with more tokens than the router would send them.
    found += [Cell(1, n, 0, ALL, hot) for n in (64, 256, max_tokens) if n <= max_tokens for hot in (top_k, 2 * top_k)]
    # Between query blocks.
    long = [n for n in coarse(max_tokens)[-3:-1] if n >= LEAST_CUT]
    found += [Cell(1, n, c, pieces=PIECES) for n in long for c in (0, max_context)]
    return [cell for cell in dict.fromkeys(found) if cell.kv_tokens <= kv_tokens and cell.hot <= experts]


def mixed_lengths(mean: float, sequences: int, most: int | None = None) -> list[int]:
    """Lengths of sequences as they meet in serving: evenly spread from half of `mean` to one and a half, none above
    `most`, summing to `sequences` x `mean` but for rounding."""
    width = mean if most is None else min(mean, 2 * (most - mean))
    return [round(mean + width * ((i + 0.5) / sequences - 0.5)) for i in range(sequences)]
