"""A pass recorded piece by piece, from one preemption point to the next, and replayed.

The pass is an ordinary one: its greenlet runs to its next point while the device records what it launches. Nothing here
knows a model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Piece(Protocol):
    """What was recorded between two points."""

    def replay(self) -> None:
        """Launch it again: the same kernels on the same memory."""


class Recorder(Protocol):
    """Records the pieces of one pass, in their order; what they allocate stays theirs."""

    def recording(self) -> AbstractContextManager[None]:
        """A context around all pieces of the pass, and what is run before them."""

    def record(self, run: Callable[[], T]) -> tuple[Piece, T]:
        """What `run` launches, and what it returns. Nothing of it is computed now."""


class GraphRecorder:
    """Records pieces as CUDA graphs in one memory pool of their own.

    A pool for each recorded pass: a pass that is suspended keeps what lies in its pool, whoever is replayed meanwhile.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream  # one for all recorded passes, which then share the libraries' workspaces
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """On a stream of its own, as capturing needs; without garbage collection, which may destroy graphs."""
        torch.cuda.synchronize(self._stream.device)
        collects = gc.isenabled()
        gc.disable()
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            # The context is entered here and left here, around whole pieces: in a greenlet it would leak.
            with torch.cuda.stream(self._stream):
                yield
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        finally:
            if collects:
                gc.enable()

    def record(self, run: Callable[[], T]) -> tuple[Piece, T]:
        """What `run` launches, as a graph."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = run()
        except BaseException:
            with suppress(RuntimeError):  # the first error says more
                graph.capture_end()
            raise
        graph.capture_end()
        return graph, result
