"""A pass: one forward pass over a batch, the unit that is launched, suspended and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qllm.scheduler.decode import DecodeBatch
from qllm.scheduler.request import Request

NEVER = float("inf")


class Chunk(NamedTuple):
    """`tokens` new tokens of a request's context, over `context` tokens whose KV is held already."""

    request: Request
    tokens: int
    context: int


class Pass:
    """Chunks of prefills, and a decode batch, in one forward pass.

    Attributes:
        id: Number of the pass, from 0 in the order of the launches.
        prefill: Chunks of prompts.
        decode: Those that decode; None: nobody does.
        n_decode: How many decode.
        decode_context: KV tokens that they hold in all before the pass.
        tokens: Tokens in the pass.
        level: The most urgent level in it.
        prefill_level: The most urgent level among its prefills; inf: it only decodes.
        after_prefill: Whether what ran before it was launched had prefills.
        launched: When it was launched or last went on, in seconds.
        running_s: Seconds that it ran, until it was last suspended.
        suspended_s: Seconds that it was suspended, until it last went on.
        suspended_at: When it was last suspended, while it is; else inf.
        preemptions: How often it was suspended.
        restored: Requests whose KV comes back from host memory before the pass; None: no request's.
        offloaded: Requests whose KV goes to host memory before the pass; None: no request's.
        cancelled: Whether all its requests were aborted.
        aborted: Those that were; None: none was.
        cursor: What the device that runs the pass keeps of it, and where it stands.
    """

    __slots__ = (
        "aborted",
        "after_prefill",
        "cancelled",
        "cursor",
        "decode",
        "decode_context",
        "id",
        "launched",
        "level",
        "n_decode",
        "offloaded",
        "preemptions",
        "prefill",
        "prefill_level",
        "restored",
        "running_s",
        "suspended_at",
        "suspended_s",
        "tokens",
    )

    def __init__(
        self, id: int, prefill: list[Chunk], decode: DecodeBatch | None, now: float, after_prefill: bool = False
    ):
        self.id = id
        self.after_prefill = after_prefill
        self.prefill = prefill
        self.decode = decode
        if decode is None:
            self.n_decode = self.decode_context = 0
        else:
            self.n_decode = len(decode.members)
            self.decode_context = decode.context
        self.find_levels()
        self.tokens = self.n_decode
        for c in prefill:
            self.tokens += c.tokens
        self.launched = now
        self.running_s = 0.0
        self.suspended_s = 0.0
        self.suspended_at = NEVER
        self.preemptions = 0
        self.cancelled = False
        self.aborted: list[Request] | None = None
        self.restored: list[Request] | None = None
        self.offloaded: list[Request] | None = None
        self.cursor: Any = None

    def find_levels(self) -> None:
        """Work out `level` and `prefill_level` from the requests in the pass."""
        prefill, decode = self.prefill, self.decode
        self.prefill_level: float = min([c.request.level for c in prefill]) if prefill else NEVER
        level = NEVER if decode is None else decode.level
        self.level: float = level if level < self.prefill_level else self.prefill_level

    @property
    def rows(self) -> int:
        """Sequences that get a new token: those that decode, and prefills that reach their last known token."""
        rows = self.n_decode
        for r, new, cached in self.prefill:
            rows += cached + new == r.prompt_tokens + r.generated
        return rows

    @property
    def moved_tokens(self) -> int:
        """Tokens whose KV comes back from host memory or goes there before the pass."""
        if self.restored is None and self.offloaded is None:
            return 0
        return sum(r.computed for r in (*(self.restored or ()), *(self.offloaded or ())))

    def requests(self) -> list[Request]:
        """Every request in the pass: prefills, then decodes."""
        out = [c.request for c in self.prefill]
        if self.decode is not None:
            out.extend(self.decode.members.values())
        return out

    def holds(self, r: Request) -> bool:
        """Whether `r` is in the pass."""
        return r.batch is self.decode if r.batch is not None else any(c.request is r for c in self.prefill)

    def stop(self, now: float) -> None:
        """It ran until now, and so did everybody in it."""
        dt = now - self.launched
        self.running_s += dt
        if self.decode is not None:
            self.decode.running_s += dt
        for c in self.prefill:
            c.request.running_s += dt

    def suspend(self, now: float) -> None:
        """It is suspended from now on, and so is everybody in it."""
        self.suspended_at = now
        self.preemptions += 1
        if self.decode is not None:
            self.decode.preemptions += 1
        for c in self.prefill:
            c.request.preemptions += 1

    def resume(self, now: float) -> None:
        """It was suspended until now, and so was everybody in it."""
        dt = now - self.suspended_at
        self.launched = now
        self.suspended_at = NEVER
        self.suspended_s += dt
        if self.decode is not None:
            self.decode.suspended_s += dt
        for c in self.prefill:
            c.request.suspended_s += dt

    def priority(self) -> int:
        """The most urgent priority among its requests, whatever levels the policy made of them."""
        return min(r.priority for r in self.requests())

    def suspended_for(self, now: float) -> float:
        """Seconds that the pass has been suspended in all."""
        return self.suspended_s + max(0.0, now - self.suspended_at)

    def __repr__(self) -> str:
        return f"<Pass {self.id} level={self.level} prefill={len(self.prefill)} decode={self.n_decode}>"


def longest_suspended(passes: Sequence[Pass], bound: float, now: float) -> Pass | None:
    """The one of `passes` that was suspended for longest, if that is `bound` seconds or more (I8)."""
    if bound == NEVER:
        return None
    longest = max(passes, key=lambda p: (p.suspended_for(now), -p.id))
    return longest if longest.suspended_for(now) >= bound else None


def time_spent(r: Request, p: Pass | None, now: float) -> tuple[float, float, int]:
    """Seconds that `r`, in pass `p` or in none, was running and suspended until now, and how often it was suspended."""
    running, suspended, preemptions = r.running_s, r.suspended_s, r.preemptions
    if r.batch is not None:
        running += r.batch.running_s
        suspended += r.batch.suspended_s
        preemptions += r.batch.preemptions
    if p is not None and p.suspended_at == NEVER:
        running += now - p.launched
    elif p is not None:
        suspended += now - p.suspended_at
    return running, suspended, preemptions
