"""A request inside the engine."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from qllm.executor.engine.stream import RequestTimes, Stream
from qllm.executor.errors import ExecutorError, RequestFailed, UnusableLogits
from qllm.executor.model.kv_cache import HostKV
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.sampling.logprobs import Logprobs
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import RowState
from qllm.scheduler import Request, State


@dataclass(eq=False, kw_only=True)
class EngineRequest(Sequence):
    """One request inside the engine: a sequence, the scheduler's request for it, and the client's stream."""

    request: Request
    stream: Stream
    sampling: SamplingParams
    seed: int  #: of its random numbers
    state: RowState | None = None  #: of its sampling, where its parameters need one
    drawn: int | None = None  #: its next token, where the pass that it is in has drawn one
    host: HostKV | None = None  #: its KV while that lies in host memory
    ended: bool = False
    error: Exception | None = None  #: what ended it, if an error did

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def dropped(self) -> bool:
        """Whether the scheduler took its KV away, to be recomputed."""
        return bool(self.blocks) and self.request.state is State.WAITING and self.request.computed == 0

    @property
    def logprobs(self) -> Logprobs | None:
        """Those of the token drawn last, where they are wanted."""
        return None if self.state is None else self.state.logprobs

    def undrawn(self) -> RequestFailed:
        """What the client is told where no token could be drawn."""
        broken = None if self.state is None else self.state.error
        return self.failure(broken or UnusableLogits("its logits hold NaN or infinity, or leave no token to choose"))

    def end(self, reason: str, times: RequestTimes, error: ExecutorError | ValueError | None = None) -> None:
        """Tell the client, once."""
        if not self.ended:
            self.ended = True
            self.error = error
            self.stream.end(reason, times, error)

    def failure(self, error: Exception, what: str = "") -> RequestFailed:
        """What the client is told where `error` ends the request; `what` says what broke."""
        traceback.clear_frames(error.__traceback__)  # they hold the pass's activations
        failure = RequestFailed(f"request {self.request.id}: {what}{type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
