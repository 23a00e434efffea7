"""How many KV blocks there are, and which belong to which sequence.

The scheduler's budget says how many may be taken, this says which.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from qllm.executor.engine.requests import EngineRequest
from qllm.executor.errors import ExecutorError
from qllm.executor.model.info import fitting_blocks, ring_size
from qllm.executor.model.kv_cache import PagedKVCache, Rings
from qllm.executor.model.runner import has_kernels
from qllm.executor.recurrent.states import move_state
from qllm.scheduler import Limits, Pass, Scheduler, State
from qllm.scheduler.memory import residents

log = logging.getLogger(__name__)


def fitted(
    model: PreTrainedModel, facts: dict[str, Any], given: Limits, kv_memory: int | None
) -> tuple[Limits, Rings | None]:
    """The limits with KV blocks, as many as fit where nobody says how many, and the rings of layers with a window.

    Args:
        model: is on its device.
        facts: what `qllm.executor.model.info.model_facts` found.
        given: the limits that were asked for.
        kv_memory: bytes for KV, in place of their `kv_blocks`.

    Raises:
        KVMemoryError: not a single block fits.
    """
    size = ring_size(facts["window"], given.block_size, kernels=has_kernels(model.device))
    blocks = given.kv_blocks
    resident = residents(given.max_seqs, given.max_resident)
    if blocks is None or kv_memory is not None:
        blocks = fitting_blocks(model, facts, given.block_size, resident, kv_memory)
    bound = resident if size or facts["state_bytes"] else given.max_resident
    rings = Rings(min(blocks, resident * size), size, facts["window"]) if size else None
    return dataclasses.replace(given, kv_blocks=blocks, max_resident=bound), rings


class Pool:
    """Blocks of one kind, and which of them are free.

    A sequence's blocks lie together as far as that can be: scattered ones take a CPU, which reads ahead, longer.
    """

    def __init__(self, n_blocks: int):
        self._free = np.ones(n_blocks, dtype=bool)
        self.held = 0  #: blocks in use

    @property
    def left(self) -> int:
        """Blocks that are free."""
        return len(self._free) - self.held

    def take(self, blocks: list[int], need: int) -> None:
        """Add `need` free blocks to those of a sequence."""
        while need > 0:
            first = blocks[-1] + 1 if blocks else len(self._free)
            if first == len(self._free) or not self._free[first]:
                first = self._room(need)
            run = self._free[first : first + need]
            taken = len(run) if run.all() else int(run.argmin())
            self._free[first : first + taken] = False
            blocks.extend(range(first, first + taken))
            self.held += taken
            need -= taken

    def give(self, blocks: list[int]) -> None:
        """Take `blocks` back."""
        self._free[blocks] = True
        self.held -= len(blocks)

    def _room(self, need: int) -> int:
        """Where to put `need` blocks: amid the longest free run, so that they and those before the run can grow."""
        # At its start where it is not longer than `need`.
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        longest = int((ends - starts).argmax())
        return int(starts[longest] + max(0, ends[longest] - starts[longest] - need) // 2)


class BlockManager:
    """Gives the blocks of one cache to sequences, and moves KV to host memory and back.

    Of layers that keep a window a sequence has a ring, which stops growing when it is full. How many sequences have one
    at a time is bounded by `Limits.max_resident`, and so is what the pool of these layers must hold.
    """

    def __init__(self, cache: PagedKVCache):
        self._cache = cache
        self._blocks = Pool(cache.n_blocks)
        self._rings = Pool(0 if cache.rings is None else cache.rings.n_blocks)

    @property
    def held(self) -> int:
        """Blocks in use, those of rings included."""
        return self._blocks.held + self._rings.held

    def grow(self, sequence: EngineRequest, tokens: int, others: Iterable[EngineRequest]) -> None:
        """Give `sequence` the blocks for `tokens` tokens, those of dropped `others` if needed. Raises ExecutorError."""
        blocks, rings = -(-tokens // self._cache.block_size), self._cache.rings
        need = blocks - len(sequence.blocks)
        in_ring = 0 if rings is None else rings.need(blocks) - len(sequence.ring)
        # Who gets its first blocks gets room for a state too, where there is one: that of a sequence that was dropped.
        if not sequence.blocks or need > self._blocks.left or in_ring > self._rings.left:
            for other in others:
                if other.dropped:
                    self.forget(other)
        for what, pool, n in (("KV blocks", self._blocks, need), ("KV blocks of windows", self._rings, in_ring)):
            if n > pool.left:
                raise ExecutorError(f"{n} {what} needed, {pool.left} free: more in use than the scheduler knows of")
        self._blocks.take(sequence.blocks, need)
        self._rings.take(sequence.ring, in_ring)

    def release(self, sequence: EngineRequest) -> None:
        """Take back all that `sequence` holds, here and in host memory."""
        self._blocks.give(sequence.blocks)
        self._rings.give(sequence.ring)
        sequence.blocks, sequence.ring = [], []
        sequence.host = None

    def forget(self, sequence: EngineRequest) -> None:
        """The scheduler dropped the KV of `sequence`: it will be computed again."""
        log.info("request %s evicted: its KV is dropped, to be computed again", sequence.request_id)
        self.release(sequence)
        sequence.computed, sequence.recurrent = 0, None

    def offload(self, sequence: EngineRequest) -> None:
        """Move the KV of `sequence` to host memory, unless the scheduler has decided otherwise since."""
        if sequence.host is None and sequence.request.state is State.OFFLOADED:
            host = self._cache.offload(sequence.blocks, sequence.computed, sequence.ring)
            move_state(sequence.recurrent, "cpu")
            self.release(sequence)
            sequence.host = host
            log.info("request %s evicted: its KV is in host memory, %d bytes", sequence.request_id, host.nbytes)

    def restore(self, sequence: EngineRequest, others: Iterable[EngineRequest]) -> None:
        """Bring the KV of `sequence` back from host memory, unless the scheduler has decided otherwise since."""
        if sequence.host is not None and sequence.request.state is not State.OFFLOADED:
            self.grow(sequence, sequence.computed, others)
            self._cache.restore(sequence.host, sequence.blocks, sequence.ring)
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

    def check_idle(self, s: Scheduler, sequences: int) -> None:
        """Raise ExecutorError if anything is held though nobody is in the system (invariants I1 and I4)."""
        if sequences or s.requests or s.suspended_passes or self.held or s.kv.free != s.kv.total:
            raise ExecutorError(
                f"idle with {sequences} sequences, {len(s.requests)} requests, {len(s.suspended_passes)} suspended "
                f"passes, {self.held} KV blocks held ({s.kv.total - s.kv.free} by the scheduler's count)"
            )
