"""How one request's tokens are chosen: the parameters, each checked by type and range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypedDict, TypeGuard

from qllm.executor.errors import SamplingError
from qllm.executor.sampling.grammar import Grammar

COLDEST = 1e-6  # temperature: below, logits over it may be beyond float32
MOST_LOGPROBS = 20  # most likely tokens reported beside the chosen one
MOST_BIAS = 100  # either way, as in OpenAI's API


class SamplingArguments(TypedDict, total=False):
    """The arguments of `SamplingParams` that `Engine.submit` hands on; `stop` is an argument of its own there."""

    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    min_tokens: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    grammar: Grammar | None


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    They apply in vLLM's order: grammar, stop tokens before `min_tokens`, `logit_bias`, `repetition_penalty`,
    `frequency_penalty`, `presence_penalty`; then, unless greedy, temperature, `min_p`, `top_k`, `top_p`. (transformers
    has `min_p` last, so that `top_p` counts the tokens that `min_p` leaves out.)

    Attributes:
        temperature: 0 is greedy.
        top_k: draw from so many most likely tokens; 0 for all.
        top_p: draw from the most likely tokens that together have this probability; above 0, at most 1.
        seed: of the draws; None for one of the engine's own.
        min_tokens: tokens before which no stop token is chosen, unless a grammar leaves nothing else.
        stop: token ids that end the request.
        min_p: draw from tokens of at least this share of the likeliest one's probability; 0 (off) to 1.
        presence_penalty: taken from the logit of each token that was generated; -2 to 2.
        frequency_penalty: taken from a token's logit for each time that it was generated; -2 to 2.
        repetition_penalty: divides a positive logit of each token of the prompt or generated, and multiplies a
            negative one; 0.01 to 100, 1 is off.
        logit_bias: added to the logits of these token ids; each -100 to 100.
        logprobs: report the logarithm of each chosen token's probability and of so many most likely ones', at most 20;
            None for none. They are the model's own: before any of what is above, and before the grammar.
        grammar: what the output has to be; only tokens that it allows are chosen.

    Raises:
        SamplingError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_tokens: int = 0
    stop: frozenset[int] = frozenset()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, fits, allowed in _NUMBERS:
            _number(name, getattr(self, name), fits, allowed)
            object.__setattr__(self, name, float(getattr(self, name)))  # torch divides by no Fraction
        _whole("top_k", self.top_k, lambda k: k >= 0, "a whole number, 0 (off) or more")
        _whole("min_tokens", self.min_tokens, lambda n: n >= 0, "a whole number, 0 or more")
        if self.seed is not None:
            _whole("seed", self.seed, lambda n: 0 <= n < 2**64, "None, or a whole number between 0 and 2**64 - 1")
        if self.logprobs is not None:
            allowed = f"None, or a whole number between 0 and {MOST_LOGPROBS}"
            _whole("logprobs", self.logprobs, lambda n: 0 <= n <= MOST_LOGPROBS, allowed)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(_biases(self.logit_bias)) or None)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise SamplingError(f"grammar is {self.grammar!r:.80}; allowed: None, or a Grammar")

    @property
    def shifts_logits(self) -> bool:
        """Whether logits of some tokens change before temperature and filters."""
        penalties = self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
        return penalties or self.logit_bias is not None

    @property
    def remembers(self) -> bool:
        """Whether a row needs more than its logits and its count of tokens (`qllm.executor.sampling.row_state`)."""
        return self.shifts_logits or self.logprobs is not None or self.grammar is not None


_PENALTY = "a number between -2 and 2"
_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda t: t == 0 or COLDEST <= t < math.inf, f"0 (greedy), or a number from {COLDEST:g}"),
    ("top_p", lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    ("min_p", lambda p: 0 <= p <= 1, "a number between 0 (off) and 1"),
    ("presence_penalty", lambda p: -2 <= p <= 2, _PENALTY),
    ("frequency_penalty", lambda p: -2 <= p <= 2, _PENALTY),
    ("repetition_penalty", lambda p: 0.01 <= p <= 100, "a number between 0.01 and 100; 1 is off"),
)


def _biases(given: Any) -> Iterator[tuple[int, float]]:
    allowed = f"None, or token ids, each with a number between {-MOST_BIAS} and {MOST_BIAS}"
    if not isinstance(given, Mapping):
        raise SamplingError(f"logit_bias is {given!r:.80}; allowed: {allowed}")
    for token, bias in given.items():
        if not is_whole(token) or token < 0:
            raise SamplingError(f"logit_bias holds the token {token!r:.80}; allowed: {allowed}")
        _number(f"logit_bias[{token!r:.40}]", bias, lambda b: -MOST_BIAS <= b <= MOST_BIAS, allowed)
        yield int(token), float(bias)


def _number(name: str, value: object, fits: Callable[[float], bool], allowed: str) -> None:
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not fits(number):
        raise SamplingError(f"{name} is {value!r:.80}; allowed: {allowed}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number, of Python or of numpy; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(name: str, value: object, fits: Callable[[int], bool], allowed: str) -> None:
    if not is_whole(value) or not fits(int(value)):
        raise SamplingError(f"{name} is {value!r:.80}; allowed: {allowed}")
