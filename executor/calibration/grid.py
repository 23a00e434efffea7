"""Which kinds of passes a calibration measures."""

from __future__ import annotations

from typing import NamedTuple

ALL = 1 << 30  # experts in a group: no point between experts
QUERY_BLOCKS = 8  # of an attention that is measured split, where it has at least ...
LEAST_SPLIT = 64  # ... so many tokens
FINE_FROM = 256  # tokens of a pass from where groups of experts are small: the longer its steps, the finer its split
PROMPT_BEFORE = 256  # tokens of the prompt before sequences that decode ...
CONTEXT_AFTER = 512  # ... over a context of at most so many tokens


class PassKind(NamedTuple):
    """A kind of pass that is measured."""

    sequences: int
    new: int  #: new tokens of each sequence
    context: int  #: tokens of each that are cached before
    experts_per_group: int = ALL  #: between two preemption points
    forced_experts: int = 0  #: all tokens go to so many; 0 leaves them to the router
    query_blocks: int = 1  #: groups that the attention is split into
    preceding_prompt: int = 0  #: tokens of the prompt that runs before it; 0: none

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.sequences * self.new

    @property
    def baseline(self) -> PassKind:
        """The same pass whole, and after others of its kind. What this one takes longer is a difference from it."""
        return self._replace(experts_per_group=ALL, query_blocks=1, preceding_prompt=0)

    @property
    def kv_tokens(self) -> int:
        """KV slots that its sequences need."""
        return self.sequences * (self.new + self.context)

    @property
    def key(self) -> str:
        """Its name in the file of finished measurements."""
        return ",".join(map(str, self))


def by_half(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `limit`: sizes that grow by half, close enough for straight lines between them."""
    sizes = {1, limit}
    size = 2
    while size < limit:
        sizes |= {size, size + size // 2}
        size *= 2
    return sorted(size for size in sizes if size <= limit)


def by_four(limit: int) -> list[int]:
    """1, 4, 16, 64, ... , `limit` / 2 and `limit`."""
    sizes = {1, max(1, limit // 2), limit}
    size = 4
    while size < limit // 2:
        sizes.add(size)
        size *= 4
    return sorted(sizes)


def by_two(limit: int) -> list[int]:
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


def pass_kinds(
    *, max_tokens: int, max_context: int, max_batch: int, kv_tokens: int, experts: int, top_k: int
) -> list[PassKind]:
    """The kinds of passes to measure, up to these sizes, without those that need more than `kv_tokens` KV slots."""
    found = [PassKind(1, n, 0) for n in sorted({*by_half(max_tokens), *by_four(max_tokens)})]  # what others rest on
    found += [PassKind(1, n, c) for c in contexts(max_context)[1:] for n in by_four(max_tokens)]
    found += [PassKind(b, 1, c) for b in by_two(max_batch) for c in contexts(max_context)]
    # Split between experts: one split each, into many groups, as what a group costs is a small difference.
    split = [PassKind(b, 1, 0) for b in sorted({1, max(1, max_batch // 4), max_batch})]
    split += [PassKind(1, n, 0) for n in sorted({16, 64, FINE_FROM, max_tokens}) if n <= max_tokens]
    parts = [4 if kind.tokens < FINE_FROM else 16 for kind in split]
    found += [kind._replace(experts_per_group=max(1, experts // n)) for kind, n in zip(split, parts, strict=True)]
    # Right after a prompt, which leaves nothing of theirs in the caches.
    context = max(c for c in contexts(max_context) if c <= CONTEXT_AFTER)
    prompt = min(PROMPT_BEFORE, max_tokens)
    found += [PassKind(b, 1, context, preceding_prompt=prompt) for b in by_two(max_batch)]
    # Experts with more tokens than the router would send them.
    sizes = [n for n in (64, 256, max_tokens) if n <= max_tokens]
    found += [PassKind(1, n, 0, forced_experts=forced) for n in sizes for forced in (top_k, 2 * top_k)]
    # Split between query blocks.
    long = [n for n in by_four(max_tokens)[-3:-1] if n >= LEAST_SPLIT]
    found += [PassKind(1, n, c, query_blocks=QUERY_BLOCKS) for n in long for c in (0, max_context)]
    return [kind for kind in dict.fromkeys(found) if kind.kv_tokens <= kv_tokens and kind.forced_experts <= experts]


def mixed_lengths(mean: float, sequences: int, most: int | None = None) -> list[int]:
    """Lengths evenly spread from half of `mean` to one and a half, none above `most`; their mean is `mean`, rounded."""
    width = mean if most is None else min(mean, 2 * (most - mean))
    return [round(mean + width * ((i + 0.5) / sequences - 0.5)) for i in range(sequences)]
