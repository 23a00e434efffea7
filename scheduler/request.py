"""A request and everything that the scheduler knows about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from math import inf, nan
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qllm.scheduler.decode import DecodeBatch


NO_TAGS: Mapping[str, str] = MappingProxyType({})


class State(IntEnum):
    """Where a request stands.

    Suspended is a state of a *pass*, by which nothing is lost. A request that gave its KV blocks up is WAITING again
    (dropped, to be recomputed) or OFFLOADED (KV in host memory).
    """

    WAITING = 0  #: in a prefill queue: new, between two chunks of its prompt, or dropped for memory
    READY = 1  #: prefilled, waits for its next decode pass
    IN_PASS = 2  #: part of a pass that runs or is suspended
    OFFLOADED = 3  #: its KV is in host memory
    FINISHED = 4
    ABORTED = 5
    FAILED = 6


class SchedulerError(ValueError):
    """Base of the scheduler's errors: the caller asked for something that is not possible."""


class RequestTooLarge(SchedulerError):
    """The request can never fit the KV budget, even alone."""


class PolicyError(SchedulerError):
    """A policy raised an exception, `__cause__`, or gave an answer that cannot be used; the message names its line."""


class RequestShed(SchedulerError):
    """The policy did not admit the request; the message says why."""


class UnknownPolicy(SchedulerError):
    """No policy of that name, or a setting that the policy does not have."""


class Request:
    """One request: what was asked for, how far it is, and its record of times (seconds on the caller's clock).

    While the request is a member of a decode batch its progress is kept by that batch for all members at once;
    :meth:`sync` brings `generated`, `computed` and `blocks` up to date.

    Args:
        id: Unique among the requests in the system.
        prompt_tokens: At least 1.
        max_tokens: Tokens to generate, at least 1.
        priority: Lower is more urgent.
        arrival: Seconds.
        cls: A label for reports that no decision reads.
        max_ttft_s: Seconds from arrival within which its first token is wanted; inf: no bound.
        max_tpot_s: Seconds from token to token, on average, that are wanted; inf: no bound.
        tenant: Whose it is, for policies that are fair to each.
        tags: What else a policy may go by.
        prefix: Keys of its context's beginning, one for each unit of a prefix cache (scheduler/prefix_cache.py): two
            requests whose first n tokens are the same have the same keys for the units among these. None: no key.

    Raises:
        SchedulerError: There are no tokens in the prompt, or none to generate; or a bound is not above 0.
    """

    __slots__ = (
        "admitted",
        "arrival",
        "batch",
        "blocks",
        "cached",
        "cls",
        "computed",
        "entry_id",
        "evictions",
        "finish",
        "first_launch",
        "first_token",
        "generated",
        "id",
        "joined",
        "last_pass",
        "level",
        "max_tokens",
        "max_tpot_s",
        "max_ttft_s",
        "order",
        "preemptions",
        "prefix",
        "priority",
        "prompt_tokens",
        "running_s",
        "shared",
        "state",
        "suspended_s",
        "tags",
        "tenant",
    )

    def __init__(
        self,
        id: int,
        prompt_tokens: int,
        max_tokens: int,
        priority: int = 0,
        arrival: float = 0.0,
        cls: str = "",
        *,
        max_ttft_s: float = inf,
        max_tpot_s: float = inf,
        tenant: str = "",
        tags: Mapping[str, str] = NO_TAGS,
        prefix: Sequence[int] = (),
    ):
        if prompt_tokens < 1 or max_tokens < 1:
            raise SchedulerError(
                f"request {id}: prompt_tokens is {prompt_tokens}, max_tokens is {max_tokens}; both must be at least 1"
            )
        if not max_ttft_s > 0 or not max_tpot_s > 0:
            raise SchedulerError(
                f"request {id}: max_ttft_s is {max_ttft_s}, max_tpot_s is {max_tpot_s}; both must be above 0"
            )
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.priority = priority
        self.arrival = arrival
        self.cls = cls
        self.max_ttft_s = max_ttft_s
        self.max_tpot_s = max_tpot_s
        self.tenant = tenant
        self.tags = tags
        self.prefix = prefix
        # what the policy made of it
        self.level = priority  #: class that decisions compare; lower is more urgent
        self.order: tuple[Any, ...] = ()  #: place in its queue
        # progress
        self.state = State.WAITING
        self.generated = 0  #: tokens generated
        self.computed = 0  #: tokens whose KV is held, or, while it holds no blocks, was found in the prefix cache
        self.blocks = 0  #: KV blocks held (members of a decode batch: derived from `computed`)
        self.shared = 0  #: units of the prefix cache among its blocks
        self.cached = 0  #: tokens that the prefix cache had when it was first admitted
        self.admitted = -1  #: rank of its first admission, kept for good; -1: never admitted
        self.batch: DecodeBatch | None = None
        self.joined = 0  #: the batch's `passes` when it joined
        self.last_pass = 0  #: the batch's `passes` when it has all its tokens
        self.entry_id = 0  #: of its place in a prefill queue; 0: in none
        # record
        self.first_launch = nan
        self.first_token = nan
        self.finish = nan
        self.running_s = 0.0
        self.suspended_s = 0.0
        self.preemptions = 0  #: how often a pass that it was in was suspended
        self.evictions = 0  #: how often its KV had to give way

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before its next token appears (the whole context after a drop)."""
        return self.prompt_tokens + self.generated - self.computed

    @property
    def queueing_s(self) -> float:
        """Seconds between arrival and finish in no pass at all; nan until it has finished."""
        return self.finish - self.arrival - self.running_s - self.suspended_s

    def sync(self) -> None:
        """Bring the progress up to date if a decode batch keeps it."""
        if self.batch is not None:
            self.batch.sync(self)

    def __repr__(self) -> str:
        return f"<Request {self.id} level={self.level} {self.state.name} {self.generated}/{self.max_tokens}>"
