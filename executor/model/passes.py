"""One forward pass in a greenlet: runs until the next preemption point, and is kept there for as long as need be.

The suspended Python stack is the saved state: suspending copies nothing, resuming recomputes nothing. A greenlet
belongs to the thread that made it: begin, advance and close passes in one thread. Inference mode is per thread too;
hold `torch.inference_mode()` around the loop that advances passes, never inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from qllm.executor.latent.latents import Latents
from qllm.executor.model.attention_plan import AttentionPlan, plan_attention
from qllm.executor.model.expert_queues import Queues
from qllm.executor.model.packed_batch import Batch, Entry
from qllm.executor.model.split import Split


class Point(NamedTuple):
    """What the pass would run next, in the numbers of `qllm.traces.step_times.cost_model.PassCostModel.position`."""

    layer: int  #: attention calls begun before this one (the decoder layer's number in all supported models)
    stage: str  #: "attention", "experts" or, after all layers, "head"
    number: int  #: of the group of query blocks, experts or sampled rows; groups without work are skipped


class RunningPass:
    """A forward pass over a batch: started, suspended or done. Made by `Runner.begin`."""

    def __init__(
        self,
        batch: Batch,
        split: Split,
        forward: Callable[[RunningPass], torch.Tensor],
        run_ahead: RunAhead,
        declared_windows: Sequence[int | None] = (),
        partners: Iterable[RunningPass] = (),
        then: Callable[[RunningPass, torch.Tensor], None] | None = None,
        queues: bool = False,
    ):
        self.batch = batch
        self.split = split
        self.keeps_queues = queues  #: whether somebody asks how many rows wait at each expert
        self.partners = partners  #: suspended passes whose waiting rows may be merged into its own
        self.point: Point | None = None  #: where the pass stands; None before the start and at the end
        self.logits = torch.empty(0)  #: `[len(sampled), vocab]`, after the end
        self.layer = -1  #: the last layer begun that attends, or mixes its tokens in another way
        self.windows: list[int | None] = []  #: what each attention layer so far told the hook
        self.declared_windows = declared_windows  #: of each layer, by configuration
        #: for each MoE layer begun, the rows of each expert; or where they end, which the device alone knows
        self.routed: list[list[int] | torch.Tensor] = []
        self.queues: Queues | None = None  #: while it stands before or between the experts of a layer
        self.latents: Latents | None = None  #: of the layer that attends next, where it keeps latents
        self._plans: dict[int | None, AttentionPlan] = {}
        self._run_ahead = run_ahead
        self._forward, self._then = forward, then
        self._greenlet = greenlet(self._compute)
        self._greenlet.running_pass = self  # the hooks find the pass through its greenlet

    def _compute(self) -> torch.Tensor:
        logits = self._forward(self)
        if self._then is not None:
            self._then(self, logits)
        return logits

    @property
    def sampled(self) -> list[Entry]:
        """The entries that `logits` belong to: those whose last known token is computed."""
        return self.batch.sampled

    @property
    def routing(self) -> list[list[int]]:
        """Rows of each expert, for each MoE layer begun so far. Waits for the device where only that knows them."""
        return [rows if isinstance(rows, list) else counts_of(rows) for rows in self.routed]

    def kept_routing(self) -> list[list[int]] | torch.Tensor:
        """`routing` for later, without a wait: where only the device knows it, where rows end `[layers, experts]`.

        It is a copy: the next pass that the same pieces replay writes where this one did.
        """
        ends = [rows for rows in self.routed if isinstance(rows, torch.Tensor)]
        return torch.stack(ends) if ends and len(ends) == len(self.routed) else self.routing

    @property
    def done(self) -> bool:
        """True once the pass ended, by its end, by an exception or by `close()`."""
        return bool(self._greenlet.dead)

    def advance(self) -> Point | None:
        """Run to the next preemption point; None at the end. Raises RuntimeError on a pass that is done.

        Also raises what the pass raises. It is then done, its sequences stand where they stood before it, and other
        passes do not notice. Where layers keep a state or no more than a window, rows of the pass may have taken the
        place of what the next rows need: such a sequence must start again, from its first token.
        """
        if self.done:
            raise RuntimeError("advance() on a pass that is done")
        answer = self._greenlet.switch()
        if not self._greenlet.dead:
            self.point = answer
            return self.point
        self.point = None
        self.logits = answer
        for entry in self.batch.entries:
            entry.seq.computed += entry.n
        return None

    def fail(self, error: BaseException) -> None:
        """Raise `error` inside the pass, where it stands; like an exception of its own, it comes out here."""
        self.point = None
        self._greenlet.throw(error)

    def close(self) -> None:
        """Give the pass up where it stands: its stack is unwound and its memory freed. Idempotent.

        Its sequences are left as `advance` leaves them where a pass breaks.
        """
        if not self.done:
            self.fail(GreenletExit())

    def held_bytes(self) -> int:
        """Bytes of the activations that the suspended pass keeps. Only for the thread that runs it."""
        # Of the tensors in its stack's variables, each storage once, without parameters and the KV cache.
        held: dict[int, int] = {}
        frame = self._greenlet.gr_frame
        while frame is not None:
            for value in chain.from_iterable(map(tensors, frame.f_locals.values())):
                if not (value.is_mkldnn or isinstance(value, torch.nn.Parameter)):
                    storage = value.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
            frame = frame.f_back
        for tensor in self.batch.cache.stores:
            held.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(held.values())

    def plan(self, window: int | None) -> AttentionPlan:
        """The attention of a layer with that sliding window (tokens, the token itself included); made once a pass."""
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = plan_attention(self.batch, self.split.query_blocks, window)
        return plan

    def begin_layer(self, window: int | None) -> int | None:
        """Called by the attention hook: a new layer begins. Returns its sliding window."""
        # Some models leave it to the mask, which they do not make for this hook: then the configuration tells it.
        self.layer += 1
        self.windows.append(window)
        if window is None and self.attention_layer < len(self.declared_windows):
            return self.declared_windows[self.attention_layer]
        return window

    @property
    def attention_layer(self) -> int:
        """Number of the last attention layer begun, by which its KV is kept."""
        return len(self.windows) - 1

    def begin_mixer(self) -> None:
        """Called by the hook of recurrent layers: a new layer begins, which has no KV."""
        self.layer += 1

    def shared_queues(self) -> list[Queues]:
        """Queues of the partners that wait at the same experts: those of the MoE layer where this pass stands."""
        begun = len(self.routed)
        return [p.queues for p in self.partners if p.queues is not None and len(p.routed) == begun]

    def reach(self, stage: str, number: int) -> None:
        """Called by the hooks inside the pass: a preemption point. Returns when the pass is resumed."""
        self._run_ahead.mark()
        point = Point(self.layer + (stage == "head"), stage, number)
        self._greenlet.parent.switch(point)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """`value` where it is a tensor, those in it where it is a tuple or an object of the hooks that holds some."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        yield from chain.from_iterable(map(tensors, value))
    elif getattr(type(value), "holds_activations", False):
        yield from tensors(tuple(vars(value).values()))


def counts_of(ends: torch.Tensor) -> list[int]:
    """Rows of each expert, by where they end (`[experts]`)."""
    counts: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return counts


def current_pass() -> RunningPass | None:
    """The pass whose code is running, None outside of any."""
    running: RunningPass | None = getattr(getcurrent(), "running_pass", None)
    return running


class RunAhead:
    """Bounds how far the host's launches run ahead of the device: at most `depth` points; does nothing on a CPU.

    A hook orders launches, not kernels: without a bound, "between two experts" would hold on the host alone. With one
    step in flight behind the one that runs, the device still never waits for the host to look (measured on an H200,
    docs/engine.md), and with two, urgent work waits for one more.
    """

    def __init__(self, device: torch.device, depth: int = 1):
        self._depth = depth
        self._events: list[torch.Event] | None = [] if device.type != "cpu" else None
        self._reached: list[torch.Event] = []  # recorded anew at the next points
        self._device = device

    def mark(self) -> None:
        """The host is at a point: wait until the device is at most `depth` points behind."""
        if self._events is None:
            return
        event = self._reached.pop() if self._reached else torch.Event(self._device)
        event.record()
        self._events.append(event)
        if len(self._events) > self._depth:
            oldest = self._events.pop(0)
            self.wait(oldest)
            self._reached.append(oldest)

    @staticmethod
    def wait(event: torch.Event) -> None:
        """Wait until the device has got there; apart, so that whoever times the host can leave it out."""
        event.synchronize()
