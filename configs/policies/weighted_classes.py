"""Weighted classes: where all have work, each priority has the device for seconds in proportion to its weight."""

from qllm.scheduler import NEVER, Policy


class WeightedClasses(Policy):
    def __init__(self, weights: dict | None = None):  # priority -> weight; 1 for those not named
        self.weights = weights or {}

    def start(self, s):
        self.now, self.used = 0.0, {}  # seconds over weight: of the class chosen last, and of each

    def select(self, s, batch, now):
        behind = min(s.waiting.levels(), key=lambda n: self.used.get(n, self.now), default=NEVER)
        if s.has_slot(NEVER) and batch.prefill(only=behind):
            self.now = max(self.now, self.used.get(behind, 0.0))  # nobody saves up seconds by being away
        else:
            batch.decode()

    def ran(self, s, p, now, ended):
        for r in p.requests():
            part = (now - p.launched) / len(p.requests()) / self.weights.get(r.priority, 1.0)
            self.used[r.level] = max(self.used.get(r.level, 0.0), self.now) + part
