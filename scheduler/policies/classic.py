"""The policies that the paper has or is compared with, and hybrid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qllm.scheduler.pass_builder import PassBuilder
from qllm.scheduler.passes import NEVER, Pass
from qllm.scheduler.policies.settings import at_least, boolean, whole
from qllm.scheduler.policy import Granularity, Policy
from qllm.scheduler.request import Request, UnknownPolicy

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler


class Fcfs(Policy):
    """Iteration-level first come, first served, blind to priority: the paper's baseline, as Hugging Face TGI has it.

    When the batch has room, new arrivals are prefilled together, then decoding goes on.
    """

    steady = True

    def level(self, r: Request) -> int:
        return 0


class Priority(Policy):
    """Iteration-level priority: like fcfs, but prefills and places in the batch go to the most urgent first.

    Less urgent requests that lose their place in the batch sit idle with their KV.
    """

    steady = True


class Chunked(Policy):
    """Iteration-level priority with chunked prefill, as Sarathi-Serve and vLLM have it.

    Each pass decodes everybody and fills up with prefill, most urgent first, cutting prompts to fit. Where the batch
    is full, a prompt takes the place of a less urgent request that decodes.

    Args:
        budget: Tokens that a pass is filled up to.
    """

    steady = True

    def __init__(self, budget: int = 512):
        self.budget = whole(1, "chunked", "budget", budget)

    def select(self, s: Scheduler, batch: PassBuilder, now: float) -> None:
        level = s.waiting.level()
        if level < max(s.ready.batch.levels, default=level):
            batch.prefill(up_to=level, tokens=self.budget, chunk=True)
        batch.decode()
        batch.prefill(tokens=max(self.budget - batch.tokens, 1), chunk=True)


class Qllm(Policy):
    """The paper's Algorithm 1, preempting a pass at expert boundaries when an LS prefill waits.

    Args:
        fill_tokens: How many BE prefill tokens may fill up an LS prefill batch. None: no bound, as the algorithm is
            printed (whole prompts). 0: none, the LS prefill runs alone. Otherwise prompts are cut to fit.
        resume: When a suspended pass goes on: once no LS prefill waits ("prefill"), or only once no LS work is left at
            all ("idle"). The first gives LS its TTFT, which is what preemption is for. Waiting through every LS decode
            would starve BE, whose activations and KV blocks stay occupied meanwhile.
        max_suspended_s: A pass that has been suspended for so many seconds in all is not suspended again, and goes on
            at the next decision. None: no bound.
        merge: Whether the launches of the pass that runs take tokens of suspended passes that wait at the same experts
            (the paper's per-expert queues).

    Raises:
        UnknownPolicy: A setting is not what is allowed.
    """

    granularity: Granularity = "expert"
    steady = True

    def __init__(
        self,
        fill_tokens: int | None = None,
        resume: str = "prefill",
        max_suspended_s: float | None = None,
        merge: bool = False,
    ):
        if resume not in ("prefill", "idle"):
            raise UnknownPolicy(f"qllm: resume is {resume!r:.80}, must be prefill or idle")
        self.fill_tokens = None if fill_tokens is None else whole(0, "qllm", "fill_tokens", fill_tokens)
        self.max_suspended_s = (
            NEVER if max_suspended_s is None else at_least(0, "qllm", "max_suspended_s", max_suspended_s)
        )
        self.resume_when_idle = resume == "idle"
        if boolean("qllm", "merge", merge):  # else as the class says
            self.merge = True

    def select(self, s: Scheduler, batch: PassBuilder, now: float) -> None:
        ls = self.urgent
        full = s.ready.count(ls) >= s.limits.max_seqs
        if not full and s.waiting.level() <= ls and batch.prefill(up_to=ls):  # (2) LS prefill ...
            if self.fill_tokens is None:  # ... filled up from BE prefill
                batch.prefill(overcommit=True)
            elif self.fill_tokens:
                batch.prefill(tokens=self.fill_tokens, chunk=True, overcommit=True)
        elif s.ready.batch.level <= ls:  # (1), (3) LS decode, filled up from BE decode
            batch.decode()
        elif not self._continue_prefill(s, batch) and not batch.decode():  # (4) BE decode
            batch.prefill()  # (5) BE prefill

    def _continue_prefill(self, s: Scheduler, batch: PassBuilder) -> bool:
        """A prompt longer than a pass that has begun goes on before BE decodes: to the paper it is one pass."""
        level = s.waiting.level()
        r = s.waiting.peek(level)
        return r is not None and bool(r.blocks) and batch.prefill(up_to=level)

    def preempts(self, s: Scheduler, running: Pass, now: float) -> bool:
        level = s.waiting.level()
        return (
            level <= self.urgent
            and level < running.prefill_level
            and running.suspended_s < self.max_suspended_s
            and s.can_prefill(level)
        )

    def resume(self, s: Scheduler, suspended: Pass, now: float) -> bool:
        level = s.waiting.level()
        if level <= self.urgent and level < suspended.prefill_level and s.can_prefill(level):
            return False
        return not (
            self.resume_when_idle and s.ready.batch.level <= self.urgent and s.ready.batch.level < suspended.level
        )


class Layer(Qllm):
    """qllm that may stop a pass between layers only."""

    granularity: Granularity = "layer"

    def __init__(self, fill_tokens: int | None = None, resume: str = "prefill", max_suspended_s: float | None = None):
        super().__init__(fill_tokens, resume, max_suspended_s)  # its passes never wait between experts: no merge


class Hybrid(Qllm):
    """Chunked prefill that also preempts for LS prefills.

    Where LS waits, its prefill runs at once and alone, suspending what runs. Else everybody decodes, and the pass is
    filled up with prefill, most urgent first. So LS gets qllm's TTFT, and BE prefills never wait for decodes to end as
    they do under Algorithm 1. The budget may be several times that of `chunked`, since it no longer bounds how long LS
    waits.

    Args:
        budget: Tokens that a pass is filled up to.
        max_suspended_s: As for `Qllm`.
        merge: As for `Qllm`.
    """

    steady = True

    def __init__(self, budget: int = 2048, max_suspended_s: float | None = None, merge: bool = False):
        super().__init__(max_suspended_s=max_suspended_s, merge=boolean("hybrid", "merge", merge))
        self.budget = whole(1, "hybrid", "budget", budget)

    def select(self, s: Scheduler, batch: PassBuilder, now: float) -> None:
        if not (s.waiting.level() <= self.urgent and batch.prefill(up_to=self.urgent)):
            batch.decode()
            batch.prefill(tokens=max(self.budget - batch.tokens, 1), chunk=True)
