"""Which KV blocks are whose. The scheduler's budget says how many may be taken, this says which."""

from __future__ import annotations

from collections.abc import Iterable

from executor.errors import ExecutorError
from executor.jobs import Job
from executor.kv_cache import PagedKVCache
from scheduler import State


class KVMemory:
    """The blocks of one cache: free ones, those in the jobs' block tables, and the way to host memory and back."""

    def __init__(self, cache: PagedKVCache):
        self._cache = cache
        self._free = list(range(cache.n_blocks - 1, -1, -1))

    @property
    def held(self) -> int:
        """Blocks in use."""
        return self._cache.n_blocks - len(self._free)

    def grow(self, job: Job, tokens: int, others: Iterable[Job]) -> None:
        """Blocks for `tokens` tokens of `job`; where too few are free, those of `others` that the scheduler has
        dropped. Raises ExecutorError where the budget was overdrawn."""
        need = -(-tokens // self._cache.block_size) - len(job.blocks)
        if need > len(self._free):
            for other in others:
                if other.dropped:
                    self.forget(other)
        if need > len(self._free):
            raise ExecutorError(
                f"{need} KV blocks needed, {len(self._free)} free: more in use than the scheduler knows of"
            )
        for _ in range(need):
            job.blocks.append(self._free.pop())

    def release(self, job: Job) -> None:
        """Take back all that `job` holds, here and in host memory."""
        self._free.extend(reversed(job.blocks))
        job.blocks = []
        job.host = None

    def forget(self, job: Job) -> None:
        """The scheduler dropped the KV of `job`: it will be computed again."""
        self.release(job)
        job.computed = 0

    def offload(self, job: Job, others: Iterable[Job]) -> None:
        """Move the KV of `job` to host memory, unless the scheduler has thought better of it."""
        if job.host is None and job.request.state is State.OFFLOADED:
            host = self._cache.offload(job.blocks, job.computed)
            self.release(job)
            job.host = host

    def restore(self, job: Job, others: Iterable[Job]) -> None:
        """Bring the KV of `job` back from host memory, unless the scheduler has thought better of it."""
        if job.host is not None and job.request.state is not State.OFFLOADED:
            self.grow(job, job.computed, others)
            self._cache.restore(job.host, job.blocks)
            job.host = None
