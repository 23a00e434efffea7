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
    """The place of one request: it waits until `started()`, and counts until `left()`; both idempotent.

    Attributes:
        class_: whose limits it is counted in; `Admission.move` gives it another.
        tokens: of its prompt.
        waits: whether it has no first token yet.
    """

    def __init__(self, admission: Admission, class_: str, tokens: int):
        self.class_ = class_
        self.tokens = tokens
        self.waits = True
        self._admission = admission
        self._counts = True

    def started(self) -> None:
        """It has its first token."""
        if self.waits:
            self.waits = False
            self._admission.count(self, -1)

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
        self._check_room(class_, requests, tokens)

    def _check_room(self, class_: str, requests: int, tokens: int) -> None:
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
        tickets = [Ticket(self, class_, tokens) for tokens in prompts]
        for ticket in tickets:
            self.count(ticket, 1)
        return tickets

    def check_move(self, tickets: Sequence[Ticket], class_: str) -> None:
        """Raise ApiError where a class that is more urgent than theirs has no room for those that wait."""
        most = self._classes[class_].priority
        new = [one for one in tickets if one.waits and self._classes[one.class_].priority > most]
        if new:
            self._check_room(class_, len(new), sum(one.tokens for one in new))

    def move(self, tickets: Sequence[Ticket], class_: str) -> None:
        """Give requests another class."""
        for ticket in tickets:
            if ticket.waits:
                self.count(ticket, -1)
            ticket.class_ = class_
            if ticket.waits:
                self.count(ticket, 1)

    def count(self, ticket: Ticket, sign: int) -> None:
        """One that waits comes (1) or leaves (-1)."""
        self.waiting[ticket.class_] += sign
        self.waiting_tokens[ticket.class_] += sign * ticket.tokens
