"""Shortest prompt first within each class, nothing preempted."""

from qllm.scheduler import Policy


class ShortestFirst(Policy):
    def order(self, r):
        return (r.prompt_tokens, r.arrival, r.id)
