"""One request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass

from qllm.executor.engine.requests import Record, Stream
from qllm.executor.engine.sampling import SamplingParams
from qllm.executor.errors import ExecutorError
from qllm.executor.model.kv_cache import HostKV
from qllm.executor.model.packed_batch import SequenceState
from qllm.scheduler import Request, State


@dataclass(eq=False, kw_only=True)
class Job(SequenceState):
    """A sequence, the scheduler's request for it, and the client's stream. `host`: its KV while in host memory."""

    request: Request
    stream: Stream
    sampling: SamplingParams
    seed: int
    host: HostKV | None = None
    ended: bool = False
    error: Exception | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def dropped(self) -> bool:
        """Whether the scheduler took its KV away, to be recomputed."""
        return bool(self.blocks) and self.request.state is State.WAITING and self.request.computed == 0

    def end(self, reason: str, error: ExecutorError | ValueError | None = None) -> None:
        """Tell the client, once."""
        if not self.ended:
            self.ended = True
            self.error = error
            self.stream.end(reason, record_of(self.request), error)


def record_of(r: Request) -> Record:
    return Record(
        *(r.arrival, r.first_launch, r.first_token, r.finish, r.queueing_s, r.running_s, r.suspended_s),
        r.preemptions,
        r.evictions,
    )
