"""Who may queue. What waits is counted by class; overload is answered at once, the least urgent class first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qllm.server.errors import ApiError, unavailable
from qllm.server.settings import ServerSettings

PROBE = " a  b\n\nz\U0001f9ea"  # text that a tokenizer may shorten: spaces, and a character that it may not know


def longest_token(tokenizer: Any) -> int | None:
    """Characters that a token stands for, at most; None for a tokenizer that drops spaces or what it does not know."""
    if tokenizer is None or tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False)) != PROBE:
        return None
    return max(map(len, tokenizer.get_vocab()))


class Ticket:
    """The place of one request: it waits until `started()`, and counts until `left()`; both idempotent."""

    def __init__(self, admission: Admission, class_: str, tokens: int):
        self.class_ = class_
        self._admission = admission
        self._tokens = tokens
        self._waits = self._counts = True

    def started(self) -> None:
        """It has its first token."""
        if self._waits:
            self._waits = False
            self._admission.waiting[self.class_] -= 1
            self._admission.waiting_tokens[self.class_] -= self._tokens

    def left(self) -> None:
        """It has ended."""
        self.started()
        if self._counts:
            self._counts = False
            self._admission.open -= 1


class Admission:
    """Counts of what waits, used by the server's thread alone.

    A class's limit holds for all that waits in it and in more urgent ones: so where urgent requests pile up, the less
    urgent ones are turned away first.

    Attributes:
        open: requests of the engine that have not ended.
        waiting: of these, by class, those without a first token.
        waiting_tokens: tokens of their prompts.
        closed: whether nobody is let in any more.
    """

    def __init__(self, settings: ServerSettings):
        self._classes = settings.classes
        self.open = 0
        self.waiting = dict.fromkeys(settings.classes, 0)
        self.waiting_tokens = dict.fromkeys(settings.classes, 0)
        self.closed = False

    def check(self, class_: str, requests: int = 1, tokens: int = 0) -> None:
        """Raise ApiError where so many more requests cannot be let in."""
        if self.closed:
            raise unavailable("the server is about to end; it takes no more requests", retry_after=5)
        limit = self._classes[class_]
        urgent = [name for name, one in self._classes.items() if one.priority <= limit.priority]
        waiting = sum(self.waiting[name] for name in urgent)
        queued = sum(self.waiting_tokens[name] for name in urgent)
        for what, many, most in (
            ("requests", waiting + requests, limit.max_waiting),
            ("prompt tokens", queued + tokens, limit.max_waiting_tokens),
        ):
            if many > most:
                full = ApiError(
                    429,
                    f"too many {what} wait; allowed in class {class_}: {most}",
                    kind="rate_limit_error",
                    code="queue_full",
                    retry_after=1 + waiting // 64,
                )
                full.class_ = class_
                raise full

    def enter(self, class_: str, prompts: Sequence[int]) -> list[Ticket]:
        """Places for requests with so many prompt tokens each: for all of them, or ApiError."""
        self.check(class_, len(prompts), sum(prompts))
        self.open += len(prompts)
        self.waiting[class_] += len(prompts)
        self.waiting_tokens[class_] += sum(prompts)
        return [Ticket(self, class_, tokens) for tokens in prompts]
