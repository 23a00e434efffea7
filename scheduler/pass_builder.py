"""What a policy writes its choice into: the batch of the next pass."""

from __future__ import annotations

from qllm.scheduler.memory import Memory
from qllm.scheduler.passes import NEVER, Chunk


class PassBuilder:
    """The next pass in the making. The limits (sequences, tokens, KV blocks) are kept here, not in the policies.

    Attributes:
        chunks: Prefills taken so far.
        prefill_tokens: Tokens in them.
        decoding: Whether the decode batch is taken.
        growth: KV blocks taken for the decode batch.
    """

    __slots__ = ("_limits", "_memory", "_memory_short", "_ready", "chunks", "decoding", "growth", "prefill_tokens")

    def __init__(self, memory: Memory):
        """Take requests out of the queues of `memory`, and KV blocks from its budget."""
        self._memory = memory
        self._limits = memory.limits
        self._ready = memory.ready
        self.chunks: list[Chunk] = []
        self.prefill_tokens = 0
        self.decoding = False
        self.growth = 0
        self._memory_short = False

    def __bool__(self) -> bool:
        return self.decoding or bool(self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens in the pass so far."""
        return self.prefill_tokens + (len(self._ready.batch.members) if self.decoding else 0)

    def decode(self, at_most: int | None = None) -> bool:
        """Take the decode batch: the most urgent of those ready to decode.

        It takes as many as the limits leave room for beside the prefills taken so far. Where the KV blocks for their
        next tokens are short, the least urgent, last admitted requests give theirs up.

        Args:
            at_most: So many of them, at least 1; the others sit idle. None: as many as the limits allow.

        Returns:
            Whether anything is decoded.
        """
        ready = self._ready
        if self.decoding or not ready.batch.members:
            return self.decoding
        limits = self._limits
        places = limits.max_seqs if at_most is None else max(1, min(at_most, limits.max_seqs))
        if places != ready.places:
            ready.resize(places)
        if self.chunks:
            ready.trim(min(limits.max_seqs - len(self.chunks), limits.max_batched_tokens - self.prefill_tokens))
        need = ready.batch.blocks_needed()
        if need:
            memory = self._memory
            kv = memory.kv
            while need > kv.free and ready.batch.members:
                memory.evict_last()
                need = ready.batch.blocks_needed()
            kv.take(need)
            self.growth = need
        self.decoding = bool(ready.batch.members)
        return self.decoding

    def prefill(
        self,
        up_to: float = NEVER,
        *,
        only: float | None = None,
        tokens: float = NEVER,
        chunk: bool = False,
        overcommit: bool = False,
    ) -> bool:
        """Take waiting prefills, most urgent level first, in queue order.

        Once a request had to be left waiting for KV blocks, only requests that hold theirs already are taken, so that
        nobody less urgent eats what it waits for.

        Args:
            up_to: Levels above (less urgent than) this one are left alone.
            only: All levels but this one are left alone.
            tokens: At most so many tokens are taken.
            chunk: Whether a prompt that does not fit whole is cut. Without it, only a prompt longer than
                `limits.max_batched_tokens` is, and runs as several passes of that length.
            overcommit: Whether requests are admitted although `limits.max_seqs` others, at their level or more urgent,
                are under way. The surplus sits idle between its prefill and its decoding.

        Returns:
            Whether anything was taken.

        Raises:
            ValueError: `tokens` is not a number.
        """
        if tokens != tokens:
            raise ValueError("batch.prefill: tokens is nan, must be a number")
        memory, limits = self._memory, self._limits
        waiting = memory.waiting
        if waiting.level() == NEVER:
            return False
        taken = len(self.chunks)
        places = limits.max_seqs - taken - (len(self._ready.batch.members) if self.decoding else 0)
        room = min(tokens, limits.max_batched_tokens - self.tokens)
        for level in waiting.levels() if only is None else (only,):
            # Once nobody new is let in at a level, nobody is at the levels below.
            closed = self._memory_short or not (overcommit or memory.has_slot(level))
            if level > up_to or places <= 0 or room <= 0 or (closed and not waiting.holding):
                break
            while places > 0 and room > 0:
                r = waiting.peek(level)
                if r is None:
                    break
                if not r.blocks and (self._memory_short or not (overcommit or memory.has_slot(level))):
                    break
                memory.look_up(r)
                n = r.remaining
                if n > room:
                    if not (chunk or (n > limits.max_batched_tokens and not self)):
                        places = 0
                        break
                    n = int(room)
                if not r.blocks and not memory.admit(r):
                    self._memory_short = True
                    break
                waiting.pop(level)
                self.chunks.append(Chunk(r, n, r.computed))
                self.prefill_tokens += n
                room -= n
                places -= 1
        return len(self.chunks) > taken
