"""Shortest prompt first within each class, with ageing, so that a long one is not overtaken for ever.

A token counts as `token_s` of waiting: a prompt of 1,000 more is overtaken only by those that come within 1 s after it.
Who has waited for `max_wait_s` in all is as urgent as LS from then on, by arrival.
"""

from qllm.scheduler import Policy


class ShortestFirst(Policy):
    def __init__(self, token_s: float = 0.001, max_wait_s: float = 30.0):
        self.token_s, self.max_wait_s = token_s, max_wait_s

    def order(self, r):  # asked again when the request becomes as urgent as LS
        aged = r.level <= self.urgent < r.priority
        return (r.arrival + (0.0 if aged else self.token_s * r.prompt_tokens), r.id)
