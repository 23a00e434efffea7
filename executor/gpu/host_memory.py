"""Pinned host memory in chunks of one size: a GPU copies to and from it at full speed, while the host goes on.

To pin memory takes long. So it is pinned in large pieces, and kept for the next who needs some.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

CHUNK = 8 << 20  #: bytes of a chunk: copied in 150 microseconds, against some ten to launch a copy
CHUNKS_IN_PIECE = 32
SHARE = 0.5  # of the memory that the host could give, pinned at most
KEPT_SHARE = 0.25  # of what may be pinned, kept while nobody uses it
MEMORY_INFO = Path("/proc/meminfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Piece:
    """Memory that was pinned at once, and the numbers of its chunks that are free."""

    memory: torch.Tensor  #: uint8 `[chunks, bytes]`
    free: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Chunk:
    """`bytes` uint8 `[chunk_bytes]` of host memory; of no piece where it is not pinned."""

    bytes: torch.Tensor
    piece: Piece | None = None
    number: int = 0


class HostPool:
    """Gives out chunks of pinned memory. For one thread, but for `give_later`.

    Args:
        most_bytes: that are pinned. Chunks beyond are ordinary memory, which is copied slowly while the host waits.
        kept_bytes: that stay pinned while nobody uses them.
        chunk_bytes: of a chunk.
        pin: makes pinned memory of a shape, uint8.
    """

    def __init__(
        self,
        most_bytes: int,
        kept_bytes: int,
        chunk_bytes: int = CHUNK,
        pin: Callable[[tuple[int, int]], torch.Tensor] | None = None,
    ):
        self.chunk_bytes = chunk_bytes
        self.pieces: list[Piece] = []  #: oldest first, which are used first: so the others come free
        self._piece_bytes = chunk_bytes * CHUNKS_IN_PIECE
        self._most, self._kept = most_bytes, kept_bytes
        self._pin = pin or pinned
        self._given: deque[Sequence[Chunk]] = deque()
        self._told = False

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned."""
        return len(self.pieces) * self._piece_bytes

    def take(self, n: int) -> list[Chunk]:
        """`n` chunks, until they are given back. Raises MemoryError or RuntimeError where the host has none."""
        self.collect()
        taken: list[Chunk] = []
        try:
            while len(taken) < n:
                taken.append(self._one())
        except BaseException:
            self.give_later(taken)
            raise
        return taken

    def give_later(self, chunks: Sequence[Chunk]) -> None:
        """Give chunks back; they are free from the next `collect` on. Any thread may call it, at any time."""
        self._given.append(chunks)

    def collect(self) -> None:
        """Take in what was given back, and unpin pieces that nobody uses beyond those that are kept."""
        while self._given:
            for chunk in self._given.popleft():
                if chunk.piece is not None:
                    chunk.piece.free.append(chunk.number)
        unused = [piece for piece in self.pieces if len(piece.free) == CHUNKS_IN_PIECE]
        beyond = unused[self._kept // self._piece_bytes :]
        if beyond:
            self.pieces = [piece for piece in self.pieces if piece not in beyond]
            beyond.clear()
            unused.clear()
            unpin()
            log.info("pinned host memory: %d bytes, after some were given back", self.pinned_bytes)

    def _one(self) -> Chunk:
        piece = next((piece for piece in self.pieces if piece.free), None)
        if piece is None:
            if self.pinned_bytes + self._piece_bytes > self._most:
                return self._unpinned()
            piece = Piece(self._pin((CHUNKS_IN_PIECE, self.chunk_bytes)), [*reversed(range(CHUNKS_IN_PIECE))])
            self.pieces.append(piece)
            log.info("pinned host memory: %d bytes", self.pinned_bytes)
        number = piece.free.pop()
        return Chunk(piece.memory[number], piece, number)

    def _unpinned(self) -> Chunk:
        if not self._told:
            self._told = True
            log.warning("KV beyond %d bytes of pinned host memory moves slowly: no more is pinned", self.pinned_bytes)
        with torch.inference_mode(False):
            return Chunk(torch.empty(self.chunk_bytes, dtype=torch.uint8, device="cpu"))


def pinned(shape: tuple[int, int]) -> torch.Tensor:
    """Pinned memory, uint8, for use inside inference mode and outside."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)


def unpin() -> None:
    """Give pinned memory that no tensor holds back to the system: PyTorch keeps it else."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)  # not in every version
    if empty is not None and torch.accelerator.is_available():
        empty()


def host_pool() -> HostPool:
    """A pool that may pin a share of the memory that the host could give now."""
    most = int(available_bytes() * SHARE)
    return HostPool(most, int(most * KEPT_SHARE))


def available_bytes() -> int:
    """Memory that the host, or the container, could give, what it keeps of files included: checkpoints were read."""
    found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, StopIteration):
        lines = MEMORY_INFO.read_text().splitlines()
        found = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # no container, or one without a limit
        found = min(found, int(CONTAINER_LIMIT.read_text()))
    return found
