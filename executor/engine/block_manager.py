"""Which KV blocks belong to which sequence. The scheduler's budget says how many may be taken, this says which."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np

from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import ExecutorError
from qllm.executor.model.kv_cache import PagedKVCache
from qllm.executor.recurrent.states import move_state
from qllm.scheduler import Pass, Scheduler, State

log = logging.getLogger(__name__)


class BlockManager:
    """Gives the blocks of one cache to sequences, and moves KV to host memory and back.

    A sequence's blocks lie together as far as that can be: scattered ones take a CPU, which reads ahead, longer.
    """

    def __init__(self, cache: PagedKVCache):
        self._cache = cache
        self._free = np.ones(cache.n_blocks, dtype=bool)
        self.held = 0  #: blocks in use

    def grow(self, sequence: EngineRequest, tokens: int, others: Iterable[EngineRequest]) -> None:
        """Give `sequence` the blocks for `tokens` tokens, those of dropped `others` if needed. Raises ExecutorError."""
        need = -(-tokens // self._cache.block_size) - len(sequence.blocks)
        if need > self._left:
            for other in others:
                if other.dropped:
                    self.forget(other)
        if need > self._left:
            raise ExecutorError(f"{need} KV blocks needed, {self._left} free: more in use than the scheduler knows of")
        while need > 0:
            first = sequence.blocks[-1] + 1 if sequence.blocks else len(self._free)
            if first == len(self._free) or not self._free[first]:
                first = self._room(need)
            run = self._free[first : first + need]
            taken = len(run) if run.all() else int(run.argmin())
            self._free[first : first + taken] = False
            sequence.blocks.extend(range(first, first + taken))
            self.held += taken
            need -= taken

    def release(self, sequence: EngineRequest) -> None:
        """Take back all that `sequence` holds, here and in host memory."""
        self._free[sequence.blocks] = True
        self.held -= len(sequence.blocks)
        sequence.blocks = []
        sequence.host = None

    def forget(self, sequence: EngineRequest) -> None:
        """The scheduler dropped the KV of `sequence`: it will be computed again."""
        log.info("request %s evicted: its KV is dropped, to be computed again", sequence.request_id)
        self.release(sequence)
        sequence.computed, sequence.recurrent = 0, None

    def offload(self, sequence: EngineRequest) -> None:
        """Move the KV of `sequence` to host memory, unless the scheduler has decided otherwise since."""
        if sequence.host is None and sequence.request.state is State.OFFLOADED:
            host = self._cache.offload(sequence.blocks, sequence.computed)
            move_state(sequence.recurrent, "cpu")
            self.release(sequence)
            sequence.host = host
            log.info("request %s evicted: its KV is in host memory, %d bytes", sequence.request_id, host.nbytes)

    def restore(self, sequence: EngineRequest, others: Iterable[EngineRequest]) -> None:
        """Bring the KV of `sequence` back from host memory, unless the scheduler has decided otherwise since."""
        if sequence.host is not None and sequence.request.state is not State.OFFLOADED:
            self.grow(sequence, sequence.computed, others)
            self._cache.restore(sequence.host, sequence.blocks)
            move_state(sequence.recurrent, self._cache.device)
            sequence.host = None

    def move(self, p: Pass, sequences: Mapping[int, EngineRequest]) -> list[tuple[EngineRequest, Exception]]:
        """Move KV to host memory and back, as was decided for `p`; where that breaks, the request and the error."""
        broken: list[tuple[EngineRequest, Exception]] = []
        for r, restored in [(r, False) for r in p.offloaded or ()] + [(r, True) for r in p.restored or ()]:
            sequence = sequences.get(r.id)
            if sequence is None or any(sequence is failed for failed, _ in broken):
                continue  # it was aborted meanwhile
            try:
                if restored:
                    self.restore(sequence, sequences.values())
                else:
                    self.offload(sequence)
            except Exception as error:
                broken.append((sequence, error))
        return broken

    @property
    def _left(self) -> int:
        return self._cache.n_blocks - self.held

    def _room(self, need: int) -> int:
        """Where to put `need` blocks: amid the longest free run, so that they and those before the run can grow."""
        # At its start where it is not longer than `need`.
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        longest = int((ends - starts).argmax())
        return int(starts[longest] + max(0, ends[longest] - starts[longest] - need) // 2)

    def check_idle(self, s: Scheduler, sequences: int) -> None:
        """Raise ExecutorError if anything is held though nobody is in the system (invariants I1 and I4)."""
        if sequences or s.requests or s.suspended_passes or self.held or s.kv.free != s.kv.total:
            raise ExecutorError(
                f"idle with {sequences} sequences, {len(s.requests)} requests, {len(s.suspended_passes)} suspended "
                f"passes, {self.held} KV blocks held ({s.kv.total - s.kv.free} by the scheduler's count)"
            )
