"""Earliest deadline first: who wants its first token soonest (`max_ttft_s`, else `default_s`) is prefilled, and stops
prefills of later deadlines, and decodes. Others join it up to `fill_tokens`."""

from qllm.scheduler import NEVER, Policy


class DeadlineFirst(Policy):
    granularity = "expert"
    urgent = NEVER  # nobody is best-effort: only deadlines count

    def __init__(self, default_s: float = 30.0, fill_tokens: int = 512):
        self.default_s, self.fill_tokens = default_s, fill_tokens

    def level(self, r):  # the deadline in ms: whose passes, places and memory come first
        return round(1e3 * (r.arrival + (r.max_ttft_s if r.max_ttft_s < NEVER else self.default_s)))

    def select(self, s, batch, now):
        if batch.prefill(up_to=s.waiting.level()):
            batch.prefill(tokens=self.fill_tokens - batch.tokens)
        else:
            batch.decode()

    def preempts(self, s, running, now):
        return s.waiting.level() < running.prefill_level and s.can_prefill(s.waiting.level())
