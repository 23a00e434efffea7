"""slack: LS as on a device of its own, and BE in what LS leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qllm.scheduler.pass_builder import PassBuilder
from qllm.scheduler.passes import NEVER, Pass
from qllm.scheduler.policies.classic import Qllm
from qllm.scheduler.policies.joining import LsPass, tokens_held
from qllm.scheduler.policies.orders import ORDERS, Order
from qllm.scheduler.policies.pacing import LONGEST_GAP, OWED_S, Decoding, LaunchRate, Pacing, least_slice
from qllm.scheduler.policies.settings import at_least, share, tenant_weights, whole
from qllm.scheduler.policy import GoesOn
from qllm.scheduler.request import Request, UnknownPolicy

if TYPE_CHECKING:
    from qllm.scheduler.scheduler import Scheduler

PATIENT = 0.25  #: share of its bound within which a first token has to come, so that its prefill stops nobody


class Slack(Qllm):
    """Preempts for LS prefills, decodes LS in time, and gives BE the rest.

    An LS prefill stops what runs, and takes along what makes it hardly longer: decodes, and parts of BE prompts. Until
    the next tokens of LS are due, a BE pass runs, suspended where the slack ends; or BE joins the pass of LS, where
    that fits. Without LS everybody decodes, and the pass is filled up with prefill.

    When tokens are due: where requests have a bound `max_tpot_s`, by that. Else LS is served as on a device of its own
    that is `tpot_stretch` times slower: each pass of LS moves the time at which the next one has to start on by so
    many times what LS alone takes in it. Predictions come from `s.seconds`; where nothing is known yet, LS runs alone.

    Args:
        ttft_stretch: How many times longer an LS prefill may take for what it takes along.
        tpot_stretch: How many times longer LS tokens may take, where no `max_tpot_s` says so.
        be_share: Share of the device that BE gets at least while LS work is there, whatever the bounds.
        budget: Tokens that a pass without LS is filled up to.
        order: Who comes first within a level: "arrival", "deadline", "shortest" or "fair" (see orders.py).
        weights: With order "fair", tenant -> weight; 1 for those not named.
        max_suspended_s: As for `Qllm`.
        max_wait_s: A BE request that was in no running pass for so long in all is served as LS. None: no bound.
        shed_s: BE requests are turned away while those before them would take longer than this to be launched, as it
            goes now. None: all are let in.
        shed_ls_s: The same for LS requests, where LS alone is more than the device can do. None: they queue.

    Raises:
        UnknownPolicy: A setting is not what is allowed.
    """

    predicts = True

    def __init__(
        self,
        ttft_stretch: float = 1.05,
        tpot_stretch: float = 1.25,
        be_share: float = 0.1,
        budget: int = 8192,
        order: str = "arrival",
        weights: dict[str, float] | None = None,
        max_suspended_s: float | None = None,
        max_wait_s: float | None = None,
        shed_s: float | None = None,
        shed_ls_s: float | None = None,
    ):
        super().__init__(max_suspended_s=max_suspended_s)
        self.ttft_stretch = at_least(1, "slack", "ttft_stretch", ttft_stretch)
        self.tpot_stretch = at_least(1, "slack", "tpot_stretch", tpot_stretch)
        self.be_share = share("slack", "be_share", be_share)
        self.budget = whole(1, "slack", "budget", budget)
        if not isinstance(order, str) or order not in ORDERS:
            raise UnknownPolicy(f"slack: order is {order!r:.80}, must be one of {', '.join(ORDERS)}")
        self.weights = tenant_weights("slack", {} if weights is None else weights)
        self.order_name = order
        self.max_wait_s = NEVER if max_wait_s is None else at_least(0, "slack", "max_wait_s", max_wait_s)
        self.shed_s = NEVER if shed_s is None else at_least(0, "slack", "shed_s", shed_s)
        self.shed_ls_s = NEVER if shed_ls_s is None else at_least(0, "slack", "shed_ls_s", shed_ls_s)

    def start(self, s: Scheduler) -> None:
        self._order: Order = ORDERS[self.order_name](self.weights)
        self._pacing = Pacing(self.tpot_stretch, self.be_share)
        self._launches, self._ls_launches = LaunchRate(), LaunchRate()
        self._decoding: Decoding | None = None
        self._seen: tuple[int, int] | None = None  # launches and LS requests when `_decoding` was taken, if it holds
        self._running_id, self._running_total = -1, NEVER  # of the running pass, and its predicted seconds

    # ---- requests ----------------------------------------------------------------------------------------------

    def order(self, r: Request) -> tuple[float, float, int]:
        return self._order.key(r, urgent=r.level <= self.urgent), r.arrival, r.id

    def admits(self, s: Scheduler, r: Request, now: float) -> str | None:
        is_ls = r.level <= self.urgent
        setting, most = ("shed_ls_s", self.shed_ls_s) if is_ls else ("shed_s", self.shed_s)
        if most == NEVER:
            return None
        levels = [n for n in s.waiting.levels() if (n <= self.urgent) == is_ls and n <= r.level]
        wait = (self._ls_launches if is_ls else self._launches).wait(sum(map(s.waiting.count, levels)))
        if wait <= most:
            return None
        return f"it would wait for about {wait:.3g} s before it is launched; allowed: {most:g} s ({setting})"

    # ---- decisions ---------------------------------------------------------------------------------------------

    def select(self, s: Scheduler, batch: PassBuilder, now: float) -> None:
        ls = self.urgent
        if s.waiting.level() <= ls and batch.prefill(up_to=ls):
            self._join(s, batch)
        elif (decoding := self._ls(s)) is not None:
            self._decode_ls(s, batch, decoding, now)
        else:
            self._pacing.ls_left()
            batch.decode()
            batch.prefill(tokens=max(self.budget - batch.tokens, 1), chunk=True)

    def preempts(self, s: Scheduler, running: Pass, now: float) -> bool:
        if super().preempts(s, running, now) and now >= self._after(s, running):
            return True
        return running.level > self.urgent and running.suspended_s < self.max_suspended_s and now >= self._due(s)

    def resume(self, s: Scheduler, suspended: Pass, now: float) -> bool:
        if suspended.level <= self.urgent:
            return super().resume(s, suspended, now)
        if min(s.waiting.level(), s.ready.batch.level) > self.urgent:
            self._pacing.ls_left()
        if self._pacing.owed > OWED_S:
            return True
        if not super().resume(s, suspended, now):
            return False
        decoding = self._ls(s)
        return decoding is None or self._has_slack(decoding, now)

    def _has_slack(self, decoding: Decoding, now: float) -> bool:
        """Whether BE may run until LS has to go on."""
        alone = decoding.seconds
        return alone is not None and self._pacing.start_by(decoding) - now >= least_slice(alone)

    def recheck_at(self, s: Scheduler, running: Pass, now: float) -> float:
        if running.suspended_s >= self.max_suspended_s:
            return NEVER
        due = self._due(s) if running.level > self.urgent else NEVER
        if super().preempts(s, running, now):
            due = min(due, self._after(s, running))
        return due

    def _after(self, s: Scheduler, running: Pass) -> float:
        """From when on an LS prefill that waits may stop `running`: it may have time, and BE may be owed some."""
        start = running.launched + self._pacing.owed - OWED_S if running.level > self.urgent else -NEVER
        first = s.waiting.peek(s.waiting.level())
        if first is None or first.max_ttft_s == NEVER:
            return start
        return max(start, self._patience(s, running, first))

    def _patience(self, s: Scheduler, running: Pass, first: Request) -> float:
        """Until when `first`, which has a bound, waits for `running` to end rather than stop it."""
        if self._running_id != running.id:
            chunks = [(c.tokens, c.context) for c in running.prefill]
            found = s.seconds(chunks, running.n_decode, running.decode_context)
            self._running_id, self._running_total = running.id, NEVER if found is None else found
        left = self._running_total - running.running_s
        end, own = running.launched + left, s.seconds([(first.remaining, first.computed)])
        if own is None or end + own > first.arrival + PATIENT * first.max_ttft_s:
            return -NEVER
        return end + left / 2  # it takes longer than was predicted: nobody knows for how long

    def ran(self, s: Scheduler, p: Pass, now: float, ended: bool) -> None:
        ls = self.urgent
        if p.level > ls:
            self._pacing.be_ran(now - p.launched)
        elif ended:
            took, be_part = p.running_s + now - p.launched, _be_part(p, ls)
            alone = self._alone(s, p) if be_part else took
            self._pacing.ls_ran(now, took, alone, be_part, be_part > 0 or self._be_waits(s))
        if ended:
            self._seen = None
            for c in p.prefill:
                if not c.context and not c.request.generated:
                    self._order.launched(c.request)
                    (self._launches if c.request.level > ls else self._ls_launches).launched(c.request)

    def alike(self, s: Scheduler, p: Pass) -> GoesOn | bool:
        """BE that decodes without LS goes on, and LS alone until BE may run."""
        ls = self.urgent
        if s.waiting.level() <= ls or s.ready.count(ls):
            return False
        if p.level > ls:
            return not s.suspended_passes and (self._be_goes_on if self._pacing.owed else True)
        decoding = self._decoding
        if decoding is None or decoding.bounds < NEVER or _ls_decodes(p, ls) < p.n_decode:
            return False
        if decoding.context != p.decode_context:  # it was taken while some had no place in the batch
            return False
        if any(suspended.level <= ls for suspended in s.suspended_passes):
            return False
        return self._ls_goes_on(s, p, self._be_waits(s))

    def _be_goes_on(self, begin: float, end: float) -> bool:
        self._pacing.be_ran(end - begin)
        return True

    def _ls_goes_on(self, s: Scheduler, p: Pass, be_waits: bool) -> GoesOn:
        pacing = self._pacing
        joins = 0 if s.suspended_passes else min(len(s.ready), s.limits.max_seqs - p.n_decode)
        each = tokens_held(s, self.urgent) if joins else 0

        def fit(decoding: Decoding, now: float) -> bool:
            """Whether BE decodes join, as `_decode_ls` has it."""
            slack = pacing.start_by(decoding) - now
            if decoding.seconds is None or slack <= 0:
                return False
            mine = LsPass(s, (), decoding.n, decoding.context, each)
            return mine.decodes(decoding.seconds + slack, joins, save=LONGEST_GAP * decoding.seconds) > 0

        def goes_on(begin: float, end: float) -> bool:
            before, took = pacing.state(), end - begin
            pacing.ls_ran(end, took, took, 0.0, be_waits)
            assert self._decoding is not None  # that of the pass
            later = self._decoding.a_pass_later(s)
            if be_waits and (pacing.owed > OWED_S or self._has_slack(later, end) or (joins and fit(later, end))):
                pacing.back(before)
                return False
            self._decoding = later
            return True

        return goes_on

    def _be_waits(self, s: Scheduler) -> bool:
        ls = self.urgent
        return bool(s.suspended_passes) or len(s.ready) > s.ready.count(ls) or s.waiting.levels()[-1:] > [ls]

    # ---- LS that decodes ---------------------------------------------------------------------------------------

    def _ls(self, s: Scheduler) -> Decoding | None:
        """LS requests that are ready to decode, if there are any."""
        if s.ready.batch.level > self.urgent:
            return None
        seen = s.passes, s.ready.count(self.urgent)
        if seen != self._seen:
            self._seen, self._decoding = seen, Decoding(s, self.urgent)
        return self._decoding

    def _due(self, s: Scheduler) -> float:
        """When LS has to decode next, which stops BE."""
        decoding = self._ls(s)
        return NEVER if decoding is None else self._pacing.start_by(decoding)

    def _alone(self, s: Scheduler, p: Pass) -> float | None:
        """Seconds that a pass of LS takes without BE; None where that is not known."""
        chunks = [(c.tokens, c.context) for c in p.prefill if c.request.level <= self.urgent]
        n = context = 0
        if p.decode is not None:
            n = _ls_decodes(p, self.urgent)
            decoding = self._decoding
            held = decoding.context * n // decoding.n if decoding is not None else p.decode_context
            context = min(held, p.decode_context)
        return s.seconds(chunks, n, context) if chunks or n else None

    # ---- BE in passes of LS ------------------------------------------------------------------------------------

    def _join(self, s: Scheduler, batch: PassBuilder) -> None:
        """Decodes and a part of a BE prompt join the LS prefills in `batch`."""
        chunks = [(c.tokens, c.context) for c in batch.chunks]
        alone = s.seconds(chunks)
        if alone is None:
            return
        mine = LsPass(s, chunks, 0, 0, tokens_held(s))
        limit = max(self.ttft_stretch * alone, alone + self._pacing.owed)
        decodes = mine.decodes(limit, min(len(s.ready), s.limits.max_seqs - len(chunks)))
        if decodes:
            batch.decode(decodes)
        first = s.waiting.peek(s.waiting.level())
        if first is not None and first.level > self.urgent and not s.suspended_passes:
            tokens = mine.tokens(limit, decodes, first, self.budget)
            if tokens:
                batch.prefill(tokens=tokens, chunk=True)

    def _decode_ls(self, s: Scheduler, batch: PassBuilder, decoding: Decoding, now: float) -> None:
        """LS decodes, and BE joins it; or BE prompts come first, while there is slack."""
        slack = self._pacing.start_by(decoding) - now
        if decoding.seconds is None or slack <= 0 or s.suspended_passes:
            batch.decode(decoding.n)
            return
        mine = LsPass(s, (), decoding.n, decoding.context, tokens_held(s, self.urgent))
        limit = decoding.seconds + slack
        wanted = min(len(s.ready), s.limits.max_seqs) - decoding.n
        decodes = mine.decodes(limit, wanted, save=LONGEST_GAP * decoding.seconds)
        tokens = 0
        if slack >= least_slice(decoding.seconds):
            tokens = self._worth_joining(s, mine, limit, decodes)
            if not tokens and batch.prefill(tokens=self.budget, chunk=True):
                return
        batch.decode(decoding.n + decodes)
        if tokens:
            batch.prefill(tokens=tokens, chunk=True)

    def _worth_joining(self, s: Scheduler, mine: LsPass, limit: float, decodes: int) -> int:
        """Tokens of the first BE prompt that join the decodes of LS, where they take no longer than in a pass apart."""
        first = s.waiting.peek(s.waiting.level())
        if first is None or not s.can_prefill(first.level):
            return 0
        tokens = mine.tokens(limit, decodes, first, self.budget)
        if not tokens:
            return 0
        apart = min(first.remaining, self.budget)
        alone = s.seconds([(apart, first.computed)])
        joined = mine.seconds(decodes, (tokens, first.computed)) - mine.seconds(decodes)
        return tokens if alone is not None and joined <= alone * tokens / apart else 0


def _be_part(p: Pass, ls: float) -> float:
    """Share of the tokens of `p` that are BE's."""
    mine = sum(c.tokens for c in p.prefill if c.request.level <= ls) + _ls_decodes(p, ls)
    return 1 - mine / p.tokens


def _ls_decodes(p: Pass, ls: float) -> int:
    """How many LS requests decode in `p`."""
    return 0 if p.decode is None else sum(n for level, n in p.decode.levels.items() if level <= ls)
