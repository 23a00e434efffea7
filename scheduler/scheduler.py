"""The Scheduler: who runs next, whether a running pass yields, and when a suspended one goes on.

It is sans-IO: time is an argument (`now`, seconds), never read; it starts nothing and waits for nothing. The same
object drives the simulator on virtual time and the engine on real time. Around it the caller runs this loop::

    scheduler.add(request, now)                      # at any time
    p = scheduler.next(now)                          # a pass to start or (p.preemptions > 0) to go on with
    ... run p; at each preemption point that the policy's granularity allows:
        if scheduler.should_yield(p, now): scheduler.suspended(p, now)
    ... at its end: scheduler.finished(p, now)

Invariants (cited by the tests):
I1 conservation: every request added is waiting, ready, offloaded, in a pass, or has ended, and in one of these only.
I2 monotone clock: `now` never goes back.
I3 causality: no token before the pass that makes it was launched.
I4 KV conservation: free + held blocks = total; never negative; all free once nobody is in the system.
I5 determinism: the same calls give the same answers.
I6 work conservation: `next` returns a pass whenever a request is in the system and no pass runs.
I7 no class inversion: `next` starts no prefill while a more urgent request could have been prefilled instead, but for
   a policy that asks for one level by name (`only`).
I8 bounded suspension: where the policy sets a bound, a pass that was suspended for so long in all is due. Before it
   goes on, nothing runs but the pass that ran when it fell due, and passes that were due before it.
I9 bounded waiting: where the policy sets a bound, a request that was in no running pass for so long in all is LS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan

from qllm.scheduler.ageing import Ageing
from qllm.scheduler.decode import DecodePool
from qllm.scheduler.leaving import disband, leave
from qllm.scheduler.memory import Limits, Memory
from qllm.scheduler.pass_builder import PassBuilder
from qllm.scheduler.pass_times import PassSeconds, PassTimes
from qllm.scheduler.passes import NEVER, Pass, longest_suspended
from qllm.scheduler.policy import Policy, ask, checked_answer, checked_policy, classify, policy_error, steadiness
from qllm.scheduler.reprioritize import change_priority
from qllm.scheduler.request import Request, RequestShed, SchedulerError, State
from qllm.scheduler.waiting import WaitingQueues


class Scheduler:
    """Decides for one device: `policy` answers the questions, `limits` bound the answers. All times are seconds.

    Args:
        policy: Whom it asks.
        limits: What the device can hold.
        seconds: Predicts passes, for policies that ask `seconds`; without it they learn from passes alone.
        prefix_blocks: KV blocks that each element of `Request.prefix` stands for.

    Attributes:
        waiting: The prefill queues.
        ready: Requests that are ready to decode.
        requests: Everything in the system, by id.
        suspended_passes: Those that may go on.
        running: The pass on the device, if any.
        passes: How many were launched.
        ageing: When those that wait become as urgent as any.
    """

    def __init__(self, policy: Policy, limits: Limits, seconds: PassSeconds | None = None, prefix_blocks: int = 1):
        self.policy = checked_policy(policy)
        self.limits = limits
        self.waiting = WaitingQueues()
        self.ready = DecodePool(limits.max_seqs, limits.block_size)
        self.memory = Memory(limits, policy.urgent, self.waiting, self.ready, prefix_blocks)
        self.kv = self.memory.kv
        self.requests: dict[int, Request] = {}
        self.suspended_passes: list[Pass] = []
        self.running: Pass | None = None
        self.passes = 0
        self._ran_prefill = False  # what ran last had prefills
        self.times = PassTimes(seconds) if policy.predicts else None  #: what is known of those of passes
        self.ageing = Ageing(policy.max_wait_s, policy.urgent)
        self._hears = type(policy).ran is not Policy.ran
        self.steady, self.asks_alike = steadiness(policy)  #: see repeats.py
        self._chooses = type(policy).admits is not Policy.admits
        #: whether `should_yield` may turn true with time alone
        self.rechecks = type(policy).recheck_at is not Policy.recheck_at or policy.max_wait_s < NEVER
        ask(policy, "start", self)

    # ---- arrivals ----------------------------------------------------------------------------------------------

    def add(self, r: Request, now: float) -> None:
        """Take a request in, at its `arrival`, which may lie before `now`.

        Raises:
            RequestTooLarge: It could never fit the KV budget.
            RequestShed: The policy turned it away.
            PolicyError: The policy broke, or gave what cannot be used.
            SchedulerError: A request of that id is in the system.
        """
        if r.id in self.requests:
            raise SchedulerError(f"request {r.id}: a request of that id is in the system")
        self.memory.look_up(r)
        level, order = classify(self.policy, r)
        self.kv.check_fits(r, level)
        r.level, r.order = level, order
        if self._chooses and (reason := ask(self.policy, "admits", self, r, now)) is not None:
            raise RequestShed(f"request {r.id}: {reason}")
        try:
            self.waiting.push(r)
        except TypeError as error:
            raise policy_error(self.policy, f"order gave {r.order!r}; comparing it", error) from error
        self.requests[r.id] = r
        self.ageing.add(r)

    def reprioritize(self, request_id: int, priority: int, now: float) -> None:
        """Change a request's priority from the next decision on, wherever it stands; unknown ones are left alone.

        Raises:
            RequestTooLarge: With that priority it could never fit the KV budget; it keeps the old one.
            PolicyError: The policy broke, or gave what cannot be used; the request keeps its old priority.
        """
        r = self.requests.get(request_id)
        if r is not None and r.state is not State.ABORTED:
            change_priority(self, r, priority)

    def abort(self, request_id: int, now: float) -> Pass | None:
        """Take a request out, at once or at the end of the pass that it runs in; unknown and ended ones are left alone.

        Returns:
            A suspended pass in which nobody is left, for the caller to discard.
        """
        r = self.requests.get(request_id)
        return None if r is None or r.state is State.ABORTED else leave(self, r, now)

    def pass_of(self, r: Request) -> Pass | None:
        """Return the pass that `r` is in, running or suspended."""
        return next((q for q in (*self.suspended_passes, self.running) if q is not None and q.holds(r)), None)

    # ---- decisions ---------------------------------------------------------------------------------------------

    def next(self, now: float) -> Pass | None:
        """Decide what runs now.

        Returns:
            The pass to launch, or to go on with; None if there is nothing to do.

        Raises:
            SchedulerError: A pass is running.
        """
        if self.running is not None:
            raise SchedulerError(f"{self.running!r} is still running")
        if self.ageing.next <= now:
            self.ageing.promote(self, now)
        self.ready.refill()  # before others come back: a free place goes to the most urgent of all
        if self.memory.offloaded:
            self.memory.restore_offloaded()
        candidate = None
        if self.suspended_passes:
            due = longest_suspended(self.suspended_passes, self.policy.max_suspended_s, now)
            if due is not None:
                return self._resume(due, now)
            candidate = min(self.suspended_passes, key=_resume_order)
            if ask(self.policy, "resume", self, candidate, now):
                return self._resume(candidate, now)
        ask(self.policy, "select", self, batch := PassBuilder(self.memory), now)
        if batch.decoding or batch.chunks:
            return self._launch(batch, now)
        if candidate is not None:
            return self._resume(candidate, now)
        if not self.requests:
            return None
        if not batch.decode():  # whoever holds blocks goes first, whatever the policy left out (I6)
            batch.prefill(overcommit=True)
        return self._launch(batch, now) if batch else None

    def should_yield(self, running: Pass, now: float) -> bool:
        """Return whether `running` gives way. Asked at each preemption point; O(1) unless memory is short."""
        if running.cancelled:
            return True
        limit = self.limits.max_suspended_tokens
        if limit is not None and sum(p.tokens for p in self.suspended_passes) + running.tokens > limit:
            return False
        if self.ageing.next <= now:
            self.ageing.promote(self, now)
        try:
            answer = self.policy.preempts(self, running, now)
        except Exception as error:
            raise policy_error(self.policy, "preempts", error) from error
        return answer if answer is True or answer is False else bool(checked_answer(self.policy, "preempts", answer))

    def recheck_at(self, running: Pass, now: float) -> float:
        """Return when `should_yield` may turn true without an event; inf if it never does."""
        return min(float(ask(self.policy, "recheck_at", self, running, now)), self.ageing.next)

    # ---- what happened -----------------------------------------------------------------------------------------

    def suspended(self, p: Pass, now: float) -> bool:
        """Note that `p` stopped at a preemption point, its state kept; False where the caller discards it."""
        self._stopped(p, now)
        if p.cancelled:
            disband(self, p, now, State.ABORTED)
            return False
        p.suspend(now)
        self.suspended_passes.append(p)
        return True

    def finished(self, p: Pass, now: float, ended: Iterable[Request] = ()) -> list[Request]:
        """Note that `p` ran to its end: each of its requests whose prefill is complete has one token more.

        Args:
            p: The pass that was running.
            now: When it ended.
            ended: Those of its requests that stop early (a stop token).

        Returns:
            The requests that have all their tokens.
        """
        self._stopped(p, now, ended=True)
        done: list[Request] = []
        batch = p.decode
        if batch is not None:
            self.memory.decoding -= len(batch)
            done = batch.advance()
            for r in (*ended, *(p.aborted or ())):
                if r.batch is batch:
                    batch.remove(r)
                    done.append(r)
            self.ready.check_in(batch)
        for c in p.prefill:
            r = c.request
            r.computed += c.tokens
            self.memory.share(r)
            if r.state is State.ABORTED:
                done.append(r)
            elif r.computed < r.prompt_tokens + r.generated:
                self.waiting.push(r)
            else:
                r.generated += 1
                if isnan(r.first_token):
                    r.first_token = now
                if r.generated == r.max_tokens or r in ended:
                    done.append(r)
                else:
                    self.ready.add(r)
        for r in done:
            self.end(r, now, State.FINISHED)
        return [r for r in done if r.state is State.FINISHED] if p.aborted else done

    def failed(self, p: Pass, now: float) -> list[Request]:
        """Note that `p` broke while it ran. Its requests end with it; return them."""
        self._stopped(p, now)
        return disband(self, p, now, State.FAILED)

    # ---- what policies ask -------------------------------------------------------------------------------------

    def has_slot(self, level: float) -> bool:
        """Return whether fewer than `limits.max_seqs` requests of `level` or more urgent are under way."""
        return self.memory.has_slot(level)

    def can_prefill(self, level: float) -> bool:
        """Return whether the first request that waits at `level` could be launched now."""
        return self.memory.can_prefill(level)

    def seconds(self, chunks: Sequence[tuple[int, int]], n_decode: int = 0, context: int = 0) -> float | None:
        """Return the predicted seconds of a pass; None where nothing is known, or the policy's `predicts` is not set.

        Args:
            chunks: Of prompts: (new tokens, tokens cached before).
            n_decode: Sequences that decode.
            context: Tokens that these hold, all together.
        """
        return None if self.times is None else self.times.seconds(chunks, n_decode, context)

    # ---- passes ------------------------------------------------------------------------------------------------

    def _launch(self, batch: PassBuilder, now: float) -> Pass:
        decode = None
        if batch.decoding:
            if batch.growth:  # some of those it was taken for may have been evicted since
                surplus = batch.growth - self.ready.batch.blocks_needed()
                self.kv.give(surplus)
            decode = self.ready.check_out()
            self.memory.decoding += len(decode)
        for c in batch.chunks:
            r = c.request
            r.state = State.IN_PASS
            if isnan(r.first_launch):
                r.first_launch = now
        p = Pass(self.passes, batch.chunks, decode, now, self._ran_prefill)
        self.passes += 1
        p.offloaded, p.restored = self.memory.moves()
        self.running = p
        return p

    def _resume(self, p: Pass, now: float) -> Pass:
        self.suspended_passes.remove(p)
        p.resume(now)
        self.running = p
        return p

    def _stopped(self, p: Pass, now: float, ended: bool = False) -> None:
        """`p` ran until now, to its end or not."""
        self.running = None
        self._ran_prefill = bool(p.prefill)
        if self._hears:
            ask(self.policy, "ran", self, p, now, ended)
        p.stop(now)
        if ended and self.times is not None:
            self.times.observe(p)

    def end(self, r: Request, now: float, state: State) -> None:
        """`r` is not in the system any more."""
        if r.state is not State.ABORTED:
            r.state = state
        r.finish = now
        if r.blocks:
            self.memory.share(r)  # its answer, too
            self.memory.release(r)
        del self.requests[r.id]


def _resume_order(p: Pass) -> tuple[float, float, int]:
    """Most urgent first, prefills before decodes, then the first launched."""
    return p.level, p.prefill_level, p.id
