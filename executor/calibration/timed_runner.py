"""A runner whose passes can be timed where they are replayed, too.

No hook runs in a replay. The clock is read while a pass is recorded, each reading becomes a part of a piece, and every
replay sets the same moments anew. So the marks of a recorded pass stay with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from qllm.executor.engine.hook_clock import Stopwatch
from qllm.executor.gpu.pass_inputs import HostInputs
from qllm.executor.graphs.buckets import Bucket
from qllm.executor.graphs.pieces import Piece, Recorder
from qllm.executor.graphs.runner import GraphRunner, Recorded, graph_recorders
from qllm.executor.model.kv_cache import Rings
from qllm.executor.model.packed_batch import Batch
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.split import Split

T = TypeVar("T")
Marks = list[tuple[str, Any]]


class MarkingRecorder:
    """Records as `recorder` does, and keeps the marks that `watch` makes meanwhile."""

    def __init__(self, recorder: Recorder, watch: Stopwatch):
        self.marks: Marks = []
        self._recorder = recorder
        self._watch = watch

    def recording(self) -> AbstractContextManager[None]:
        """See Recorder."""
        return self._recorder.recording()

    def record(self, run: Callable[[], T]) -> tuple[Piece, T]:
        """See Recorder."""
        others, self._watch.marks = self._watch.marks, self.marks
        try:
            return self._recorder.record(run)
        finally:
            self._watch.marks = others


class MarkedPass(Recorded):
    """A recorded pass that hands its marks to `watch` after each replay."""

    def __init__(self, recorded: Recorded, watch: Stopwatch, marks: Marks):
        vars(self).update(vars(recorded))
        self._watch = watch
        self._marks = marks

    def replay(self, running: RunningPass, host: HostInputs, rows: int) -> torch.Tensor:
        """See Recorded."""
        logits = super().replay(running, host, rows)
        self._watch.marks += self._marks
        return logits


class TimedRunner(GraphRunner):
    """A GraphRunner that records a bucket at its first use, with the marks of `watch` where there is one.

    What is recorded with one watch, for one number of forced experts or without a watch is replayed for such passes
    alone.

    Attributes:
        watch: reads the clock in passes; while it is set, the hooks are its own (`timed`).
        replays: whether the pass that began last is replayed; else its operators are launched one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_blocks: int,
        block_size: int,
        max_seqs: int,
        *,
        kernels: bool | None = None,
        rings: Rings | None = None,
        recorder: Callable[[], Recorder] | None = None,
    ):
        settings: dict[str, Any] = {"graphs": "use", "max_seqs": max_seqs, "kernels": kernels, "rings": rings}
        super().__init__(model, kv_blocks, block_size, recorder=self._make_recorder, **settings)
        self.watch: Stopwatch | None = None
        self.replays = False
        self._make_inner = recorder
        self._marking: MarkingRecorder | None = None
        self._kinds: dict[tuple[Stopwatch | None, int], dict[Bucket, list[Recorded]]] = {}

    def place(self, batch: Batch, split: Split, *, queues: bool) -> Callable[[RunningPass], torch.Tensor]:
        """See Runner."""
        kind = (self.watch, 0 if self.watch is None else self.watch.forced_experts)
        self.recorded = self._kinds.setdefault(kind, {})
        forward = super().place(batch, split, queues=queues)
        self.replays = bool(forward != self.forward)
        return forward

    def record(self, bucket: Bucket) -> Recorded:
        """See GraphRunner."""
        recorded = super().record(bucket)
        if self.watch is None or self._marking is None:
            return recorded
        return MarkedPass(recorded, self.watch, self._marking.marks)

    def _make_recorder(self) -> Recorder:
        if self._make_inner is None:
            self._make_inner = graph_recorders(self.device)
        recorder = self._make_inner()
        if self.watch is None:
            return recorder
        self._marking = MarkingRecorder(recorder, self.watch)
        return self._marking
