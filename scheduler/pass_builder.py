"""What a policy writes its choice into: the batch of the next pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qllm.scheduler.passes import NEVER, Chunk

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler


class PassBuilder:
    """The next pass in the making. The limits (sequences, tokens, KV blocks) are kept here, not in the policies."""

    __slots__ = ("_memory_short", "_s", "chunks", "decoding", "growth", "prefill_tokens")

    def __init__(self, scheduler: Scheduler):
        self._s = scheduler
        self.chunks: list[Chunk] = []
        self.prefill_tokens = 0
        self.decoding = False
        self.growth = 0  #: KV blocks taken for the decode step
        self._memory_short = False

    def __bool__(self) -> bool:
        return self.decoding or bool(self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens in the pass so far."""
        return self.prefill_tokens + (len(self._s.ready.batch) if self.decoding else 0)

    def decode(self) -> bool:
        """Take the decode batch: the most urgent of those ready to decode, as many as the limits leave room for beside
        the prefills taken so far. Where the KV blocks for their next tokens are short, the least urgent, last admitted
        requests give theirs up. Returns whether anything is decoded."""
        s = self._s
        ready = s.ready
        if self.decoding or not ready.batch.members:
            return self.decoding
        if self.chunks:
            limits = s.limits
            ready.trim(min(limits.max_seqs - len(self.chunks), limits.max_batched_tokens - self.prefill_tokens))
        need = ready.batch.blocks_needed()
        if need:
            kv = s.kv
            while need > kv.free and ready.batch.members:
                s.memory.evict_last()
                need = ready.batch.blocks_needed()
            kv.take(need)
            self.growth = need
        self.decoding = bool(ready.batch.members)
        return self.decoding

    def prefill(
        self, up_to: float = NEVER, *, tokens: float = NEVER, chunk: bool = False, overcommit: bool = False
    ) -> bool:
        """Take waiting prefills, most urgent level first, in queue order, at most `tokens` tokens of them.

        up_to: levels above (less urgent than) this one are left alone.
        chunk: a prompt that does not fit whole is cut. Without it only a prompt longer than `limits.max_batched_tokens`
        is,
            and runs as several passes of that length.
        overcommit: admit requests although `limits.max_seqs` others, at their level or more urgent, are under way;
            the surplus sits idle between its prefill and its decoding.

        Returns whether anything was taken. Once a request had to be left waiting for KV blocks, only requests that
        hold theirs already are taken, so that nobody less urgent eats what it waits for.
        """
        s = self._s
        limits = s.limits
        waiting = s.waiting
        taken = len(self.chunks)
        places = limits.max_seqs - taken - (len(s.ready.batch) if self.decoding else 0)
        room = min(tokens, limits.max_batched_tokens - self.tokens)
        for level in waiting.levels():
            if level > up_to:
                break
            while places > 0 and room > 0:
                r = waiting.peek(level)
                if r is None:
                    break
                if not r.blocks and (self._memory_short or not (overcommit or s.has_slot(level))):
                    break
                n = r.remaining
                if n > room:
                    if not (chunk or (n > limits.max_batched_tokens and not self)):
                        places = 0
                        break
                    n = int(room)
                if not r.blocks and not s.memory.admit(r):
                    self._memory_short = True
                    break
                waiting.pop(level)
                self.chunks.append(Chunk(r, n, r.computed))
                self.prefill_tokens += n
                room -= n
                places -= 1
        return len(self.chunks) > taken
