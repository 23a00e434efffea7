"""A clock that is read where the hooks of passes begin and end. The hooks are wrapped, not copied."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from qllm.executor.model.attention import attention_forward
from qllm.executor.model.experts import ExpertsModule, experts_forward
from qllm.executor.model.hooks import NAME
from qllm.executor.model.passes import current_pass

TIMED = "qllm_timed"


class Timer(Protocol):
    """Reads a device's clock."""

    def read(self) -> Any:
        """The moment when the device has done what was launched so far."""

    def intervals(self, moments: Sequence[Any]) -> list[float]:
        """Seconds between each moment and the next; waits for the last."""


class HostTimer:
    """A CPU's monotonic clock."""

    def read(self) -> float:
        """See Timer."""
        return time.perf_counter()

    def intervals(self, moments: Sequence[float]) -> list[float]:
        """See Timer."""
        return [after - before for before, after in itertools.pairwise(moments)]


class EventTimer:
    """Timed events of an accelerator. Between two lies whatever the device waited for, the host included."""

    def __init__(self, device: torch.device):
        self._device = device

    def read(self) -> Any:
        """See Timer. While a graph is recorded this is a node of it: each replay sets the moment anew."""
        if self._device.type != "cuda":
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            return event
        external = torch.cuda.Event(enable_timing=True, external=True)
        external.record(torch.cuda.current_stream(self._device))
        return external

    def intervals(self, moments: Sequence[Any]) -> list[float]:
        """See Timer."""
        moments[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(moments)]


def timer_of(device: torch.device) -> Timer:
    """The timer of a device."""
    return HostTimer() if device.type == "cpu" else EventTimer(device)


class Stopwatch:
    """Reads a device's clock inside passes.

    Attributes:
        marks: names of moments, and the moments as the timer gives them.
        forced_experts: all tokens go to so many experts; 0 leaves them to the router.
    """

    def __init__(self, timer: Timer):
        self.timer = timer
        self.marks: list[tuple[str, Any]] = []
        self.forced_experts = 0

    def mark(self, name: str) -> None:
        """Read the clock."""
        self.marks.append((name, self.timer.read()))

    def intervals(self) -> list[float]:
        """Seconds between each mark and the next."""
        return self.timer.intervals([moment for _, moment in self.marks])

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """The attention hook between two readings."""
        self.mark("attention")
        out = attention_forward(*args, **kwargs)
        self.mark("attended")
        return out

    def experts(
        self, module: ExpertsModule, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts hook between two readings."""
        if self.forced_experts and current_pass() is not None:
            index = forced(index, self.forced_experts)
        self.mark("experts")
        out = experts_forward(module, hidden, index, weights)
        self.mark("routed")
        return out


@contextmanager
def timed(model: PreTrainedModel, timer: Timer | None = None) -> Iterator[Stopwatch]:
    """Times the passes over `model` that run inside the block, with the Stopwatch that it gives."""
    watch = Stopwatch(timer or timer_of(model.device))
    AttentionInterface.register(TIMED, watch.attention)
    ExpertsInterface.register(TIMED, watch.experts)
    try:
        model.set_attn_implementation(TIMED)
        model.set_experts_implementation(TIMED)
        yield watch
    finally:
        model.set_attn_implementation(NAME)
        model.set_experts_implementation(NAME)


def forced(index: torch.Tensor, experts: int) -> torch.Tensor:
    """Top-k indices like `index` `[T, k]` that send all tokens to the first `experts` in turn."""
    flat = torch.arange(index.numel(), device=index.device, dtype=index.dtype)
    return (flat % experts).view(index.shape)
