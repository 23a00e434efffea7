"""The sizes for which passes are captured. A pass is padded to the smallest bucket that it fits.

A bucket has room for so many decode rows and so many rows of prompts. What a pass does not need of it is padding, which
touches nothing that is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qllm.executor.gpu.pass_inputs import RECORDED_ROWS, TILE_ROWS, Room
from qllm.executor.model.packed_batch import Batch

DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  #: sequences that decode
PROMPTS = (32, 64, 128, 256, RECORDED_ROWS)  #: rows of prompts
CHUNKS = 8  #: sequences that these rows may belong to
BESIDE = 32  #: most sequences that decode beside prompts


class Bucket(NamedTuple):
    """A size of passes."""

    decode: int  #: sequences that decode
    prompts: int  #: rows of prompts, of up to CHUNKS sequences

    def room(self, blocks: int, *, rings: bool = False) -> Room:
        """The room of its inputs, with block tables of `blocks` blocks in all; `rings`: as in Room."""
        chunks = CHUNKS if self.prompts else 0
        tiles = self.prompts // TILE_ROWS + chunks  # each sequence may leave a tile half full
        return Room(self.decode + self.prompts, self.decode, tiles, self.decode + chunks, blocks, rings)


def buckets(max_seqs: int) -> Iterator[Bucket]:
    """All buckets for passes of up to `max_seqs` sequences; what most passes need comes first."""
    yield from (Bucket(n, 0) for n in sizes_up_to(max_seqs))
    for prompts in PROMPTS:
        yield Bucket(0, prompts)
        yield Bucket(beside(max_seqs), prompts)


def beside(max_seqs: int) -> int:
    """Decode rows of the buckets for prompts beside sequences that decode."""
    return sizes_up_to(min(max_seqs, BESIDE))[-1]


def sizes_up_to(max_seqs: int) -> list[int]:
    """Decode sizes, up to the first that holds `max_seqs`."""
    return [n for i, n in enumerate(DECODE) if i == 0 or DECODE[i - 1] < max_seqs]


def bucket_of(batch: Batch, max_seqs: int) -> Bucket | None:
    """The bucket of a batch in an engine of up to `max_seqs` sequences; None: it is too large for any."""
    decode, chunks = batch.n_decode, len(batch.entries) - batch.n_decode
    rows = batch.rows - decode
    sizes = sizes_up_to(max_seqs)
    if rows == 0:
        return next((Bucket(n, 0) for n in sizes if n >= decode), None)
    if chunks > CHUNKS or decode > beside(max_seqs):
        return None
    return next((Bucket(beside(max_seqs) if decode else 0, n) for n in PROMPTS if n >= rows), None)
