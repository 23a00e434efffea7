"""Rows of many tensors of a GPU to pinned host memory and back, beside what the GPU computes.

They are gathered into device buffers on the stream where passes run, and copied, a chunk at a time, on a stream of
their own. So the rows may be overwritten at once by whatever is launched next, and the host never waits. All copies, in
both directions, run in the order in which they were asked for: a chunk that was given back may be used again before the
copy that read it has run.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from qllm.executor.gpu.host_memory import Chunk, HostPool, host_pool

ALIGNED = 256  # bytes: where rows of a tensor begin in a chunk
BUFFERS_SHARE = 1 / 64  # of a device's memory, for buffers of copies under way


class Event(Protocol):
    """A moment in a stream."""

    def query(self) -> bool:
        """Whether the stream has got there."""


class Side(Protocol):
    """The stream of the copies, beside the current one; nothing here makes the host wait."""

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        """Copy on the side, not before `after`. Returns the end of the copy."""

    def mark(self) -> Event:
        """This moment of the current stream."""

    def wait(self, event: Event | None) -> None:
        """Have the current stream wait for `event`."""

    def keep(self, buffer: torch.Tensor) -> None:
        """Once `buffer` is freed, its memory is not used again before copies that know it have ended."""


class SideStream:
    """A CUDA stream for copies."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def copy(self, to: torch.Tensor, source: torch.Tensor, after: Any) -> Event:
        """See Side."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            to.copy_(source, non_blocking=True)
            ended: Event = self._stream.record_event()
        return ended

    def mark(self) -> Event:
        """See Side."""
        moment: Event = torch.cuda.current_stream(self._device).record_event()
        return moment

    def wait(self, event: Any) -> None:
        """See Side."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def keep(self, buffer: torch.Tensor) -> None:
        """See Side."""
        buffer.record_stream(self._stream)


class Part(NamedTuple):
    """Rows `first` to `first + rows` of tensor number `tensor`, in bytes `start` to `stop` of a chunk."""

    tensor: int
    first: int
    rows: int
    start: int
    stop: int

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Its own of `rows` `[n]`."""
        return rows[self.first : self.first + self.rows]

    def view(self, chunk: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Its rows `[rows, width]` in a chunk's bytes."""
        return chunk[self.start : self.stop].view(dtype).view(self.rows, -1)


@dataclass(frozen=True, eq=False)
class HostRows:
    """Some rows of each of several tensors, in chunks of host memory; they are given back when nobody holds this."""

    chunks: list[Chunk]
    parts: list[list[Part]]  #: of each chunk

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return sum(part.stop - part.start for parts in self.parts for part in parts)


@dataclass(eq=False)
class _Buffer:
    bytes: torch.Tensor  #: uint8 `[chunk_bytes]` on the device
    used: Event | None = None  #: the end of its last use


class HostCopies:
    """Moves rows of a device's tensors to host memory and back.

    Args:
        device: of the tensors.
        pool: where the rows go.
        side: the stream of the copies.
        most_buffers: device buffers, each of a chunk. Where all are in use, the current stream waits for a copy.
    """

    def __init__(self, device: torch.device, pool: HostPool, side: Side, most_buffers: int):
        self._device, self._pool, self._side = device, pool, side
        self._most = max(1, most_buffers)
        self._buffers: deque[_Buffer] = deque()  # in the order of their last use

    @classmethod
    def on(cls, device: torch.device) -> HostCopies:
        """For a CUDA device."""
        pool, total = host_pool(), torch.cuda.get_device_properties(device).total_memory
        return cls(device, pool, SideStream(device), int(total * BUFFERS_SHARE) // pool.chunk_bytes)

    def offload(self, tensors: Sequence[torch.Tensor], rows: torch.Tensor) -> HostRows:
        """Copy `rows` (int64 `[n]`, on the device) of each of `tensors` (`[..., width]`, contiguous) to host memory."""
        tensors = [t.flatten(1) for t in tensors]
        parts = layout(len(rows), [t[0].nbytes for t in tensors], self._pool.chunk_bytes)
        host = HostRows(self._pool.take(len(parts)), parts)
        weakref.finalize(host, self._pool.give_later, host.chunks).atexit = False
        for chunk, inside in zip(host.chunks, parts, strict=True):
            buffer, end = self._next_buffer(), inside[-1].stop
            self._side.wait(buffer.used)
            for part in inside:
                tensor = tensors[part.tensor]
                torch.index_select(tensor, 0, part.of(rows), out=part.view(buffer.bytes, tensor.dtype))
            buffer.used = self._side.copy(chunk.bytes[:end], buffer.bytes[:end], self._side.mark())
            self._buffers.append(buffer)
        return host

    def restore(self, host: HostRows, tensors: Sequence[torch.Tensor], rows: torch.Tensor) -> None:
        """Copy what `offload` took to `rows` (int64 `[n]`, on the device) of each of the same `tensors`."""
        self._pool.collect()
        tensors = [t.flatten(1) for t in tensors]
        for chunk, inside in zip(host.chunks, host.parts, strict=True):
            buffer, end = self._next_buffer(), inside[-1].stop
            self._side.wait(self._side.copy(buffer.bytes[:end], chunk.bytes[:end], buffer.used))
            for part in inside:
                tensor = tensors[part.tensor]
                tensor.index_copy_(0, part.of(rows), part.view(buffer.bytes, tensor.dtype))
            buffer.used = self._side.mark()
            self._buffers.append(buffer)

    def _next_buffer(self) -> _Buffer:
        """One whose last use has ended, a new one, or else the one whose last use ends first."""
        oldest = self._buffers[0] if self._buffers else None
        if oldest is None or not (len(self._buffers) >= self._most or oldest.used is None or oldest.used.query()):
            try:
                with torch.inference_mode(False):
                    buffer = torch.empty(self._pool.chunk_bytes, dtype=torch.uint8, device=self._device)
                self._side.keep(buffer)
                return _Buffer(buffer)
            except torch.OutOfMemoryError:
                if oldest is None:
                    raise
        return self._buffers.popleft()


def layout(n: int, row_bytes: Sequence[int], chunk_bytes: int) -> list[list[Part]]:
    """Where `n` rows of each of several tensors lie: the parts of each chunk, in the order of tensors and rows.

    Raises ValueError where a row is larger than a chunk.
    """
    chunks: list[list[Part]] = []
    at = chunk_bytes
    for tensor, size in enumerate(row_bytes):
        if size > chunk_bytes:
            raise ValueError(f"rows of {size} bytes in chunks of {chunk_bytes}")
        first = 0
        while first < n and size:
            at = -(-at // ALIGNED) * ALIGNED
            rows = min((chunk_bytes - at) // size, n - first)
            if rows <= 0:
                chunks.append([])
                at = 0
                continue
            chunks[-1].append(Part(tensor, first, rows, at, at + rows * size))
            first, at = first + rows, at + rows * size
    return chunks
