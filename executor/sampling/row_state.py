"""What the sampling of one request remembers between its tokens; most requests need none.

It follows the request's tokens as they lie in the engine. So it is right whatever became of passes meanwhile: of one
that was suspended after it had drawn, of KV that gave way and is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qllm.executor.errors import GrammarError, SamplingError
from qllm.executor.sampling.grammar import Grammars, Matcher
from qllm.executor.sampling.logprobs import Logprobs
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.penalties import Shifts


@dataclass(eq=False)
class RowState:
    """State of one request's row.

    Attributes:
        shifts: its penalties and biases, if there are any.
        matcher: where it stands in its grammar, if it has one.
        top: most likely tokens to report; None where no logprobs are wanted.
        seen: tokens of the request taken in.
        logprobs: of the token chosen last.
        error: why the row gave no token, where its grammar broke.
    """

    shifts: Shifts | None
    matcher: Matcher | None
    top: int | None
    seen: int
    logprobs: Logprobs | None = None
    error: GrammarError | None = None

    @property
    def changes(self) -> bool:
        """Whether the row's logits are changed, beyond temperature and filters."""
        return self.shifts is not None or self.matcher is not None

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in what the request's `tokens`, prompt and generated, have become."""
        new = tokens[self.seen :]
        self.seen = len(tokens)
        if self.shifts is not None:
            self.shifts.follow(new)
        if self.matcher is not None and new:
            self.matcher.accept(new)

    def allowed(self, params: SamplingParams, generated: int, vocabulary: int) -> np.ndarray:
        """The tokens that the grammar allows now, a bit each, the lowest first: uint8 `[ceil(vocabulary / 8)]`.

        None of them where the grammar broke. Stop tokens before `min_tokens` are none, unless nothing else is left.
        """
        bits = np.zeros((vocabulary + 7) // 8, dtype=np.uint8)
        if self.matcher is None:
            return ~bits
        try:
            found = np.frombuffer(self.matcher.bits(), dtype=np.uint8)[: len(bits)]
        except GrammarError as error:
            self.error = error
            return bits
        bits[: len(found)] = found
        if vocabulary % 8:
            bits[-1] &= (1 << vocabulary % 8) - 1
        if generated < params.min_tokens:
            without = bits.copy()
            for token in params.stop:
                if token < vocabulary:
                    without[token // 8] &= ~np.uint8(1 << token % 8)
            if without.any():
                return without
        return bits


def prepared(
    params: SamplingParams, prompt: Sequence[int], grammars: Grammars
) -> tuple[SamplingParams, RowState | None]:
    """Parameters checked against the model, and the state of a new request, if it needs one. Raises SamplingError.

    The end of a grammar ends its request, whatever `stop` says: nothing else can follow.
    """
    if not params.remembers:
        return params, None
    beyond = [token for token in params.logit_bias or () if token >= grammars.vocabulary]
    if beyond:
        raise SamplingError(
            f"logit_bias holds {beyond[0]!r:.80}; allowed: token ids from 0 to {grammars.vocabulary - 1}"
        )
    matcher = None
    if params.grammar is not None:
        matcher = grammars.matcher(params.grammar)
        params = replace(params, stop=params.stop | grammars.ends)
    shifts = Shifts(params, prompt) if params.shifts_logits else None
    return params, RowState(shifts, matcher, params.logprobs, len(prompt))
