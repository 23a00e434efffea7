"""Earliest deadline first: the class sets the deadline, and an LS prompt that waits stops the running pass."""

from qllm.scheduler import Policy


class DeadlineFirst(Policy):
    granularity = "expert"

    def __init__(self, ls_s: float = 0.5, be_s: float = 30.0):
        self.seconds = {0: ls_s}
        self.be_s = be_s

    def level(self, r):
        return 0 if r.priority <= 0 else 1

    def order(self, r):
        return (r.arrival + self.seconds.get(r.priority, self.be_s), r.id)

    def preempts(self, s, running, now):
        return s.waiting.level() < running.prefill_level and s.waiting.level() == 0 and s.can_prefill(0)
