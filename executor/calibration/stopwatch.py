"""Times the parts of real passes, with a clock that is read where the hooks begin and end.

start - first attention     lead       (batch, embedding, and the first layer's norm and QKV)
experts' end - attention    pre        norm and QKV of the next layer
attention                   attention
attention's end - experts   post       output projection, norm, router; the whole MLP of a layer without experts
experts                     experts    all groups of one layer
last layer's end - logits   tail       final norm and LM head
logits - tokens             sample

A replayed pass has one part more: `begin`, what the host takes for the batch and the first launch, by its own clock.
The lead is then the device's alone. Where operators are launched one by one, the host may be slower than the device all
along: there each part is what passes between two moments of the device, as it does in serving.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qllm.executor.calibration.timed_runner import TimedRunner
from qllm.executor.engine.hook_clock import Stopwatch
from qllm.executor.model.info import embedding
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import RunningPass
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.sampling import sample

PARTS = {"start": "lead", "attention": "attention", "attended": "post", "experts": "experts", "routed": "pre"}
HOST = "begin"  # the part that the host's clock tells
HOLD_CYCLES = 2_000_000  # about a millisecond: the host begins a pass and launches its first piece in less
DECODING = 4  # sequences that decode before a prompt
#: a sequence of a pass, and how many of its tokens are new in it
Entry = tuple[Sequence, int]
Entries = list[Entry]


@dataclass(frozen=True)
class PassTimes:
    """One measured pass: (name, seconds) of its parts (see above), and rows of each expert by MoE layer."""

    parts: tuple[tuple[str, float], ...]
    routing: tuple[tuple[int, ...], ...]

    @property
    def seconds(self) -> float:
        """The whole pass, from the batch to the sampled tokens."""
        return sum(seconds for _, seconds in self.parts)


def fill_cache(runner: Runner) -> None:
    """Fill the KV cache with random values: memory that was never written is read faster than KV ever is in serving."""
    runner.make_cache()
    for store in runner.cache.stores:
        store[:-1].normal_()  # all slots but the one that is always zero


def random_entries(runner: Runner, sizes: Iterable[tuple[int, int]], seed: object) -> Entries:
    """Entries of a pass over random tokens, `sizes`: (new, cached before) of each sequence, one after another."""
    # What lies in their blocks is taken for their KV.
    vocabulary = embedding(runner.model).num_embeddings
    rng, size, first = random.Random(str(seed)), runner.cache.block_size, 0
    entries: Entries = []
    for new, cached in sizes:
        blocks = range(first, first - (-(new + cached) // size))
        tokens = [0] * cached + rng.choices(range(vocabulary), k=new)
        ring = runner.cache.ring_of(new + cached, len(entries))
        entries.append((Sequence(tokens, [*blocks], cached, ring), new))
        first = blocks.stop
    return entries


def preceding_pass(runner: Runner, entries: Entries, prompt: int = 0) -> Entries:
    """A pass that may run before one over `entries` in serving: a prompt of so many tokens, or decoding sequences."""
    # Its tokens go to other experts. A pass that is measured alone finds the weights of its experts in the processor's
    # cache, and after a pass of its own size its memory too, as it never does in serving.
    if prompt:
        sizes = [(min(prompt, runner.cache.n_blocks * runner.cache.block_size), 0)]
    elif all(new == 1 for _, new in entries):
        sizes = [(1, seq.computed) for seq, _ in entries]
    else:
        sizes = [(1, 0)] * min(DECODING, runner.cache.n_blocks)
    return random_entries(runner, sizes, ("before", sizes))


def sample_greedily(running: RunningPass) -> None:
    """Sample the tokens of a pass that has ended, as the engine does for requests without a temperature."""
    rows = len(running.sampled)
    if rows:
        sample(running.logits, [SamplingParams()] * rows, [0] * rows, [0] * rows)


@contextmanager
def rewound(entries: Entries) -> Iterator[None]:
    """The sequences stand after the block where they stood before it."""
    before = [seq.computed for seq, _ in entries]
    yield
    for (seq, _), computed in zip(entries, before, strict=True):
        seq.computed = computed


def seconds_of(device: torch.device, what: Callable[[], object]) -> float:
    """Seconds of `what`, from an idle `device` to an idle one."""
    _synchronize(device)
    start = time.perf_counter()
    what()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hold(device: torch.device) -> None:
    """Keep an accelerator busy for about a millisecond, with nothing: it waits for nothing launched meanwhile."""
    if device.type == "cuda":
        torch.cuda._sleep(HOLD_CYCLES)


def measure(runner: TimedRunner, watch: Stopwatch, entries: Entries, split: Split | None = None) -> PassTimes:
    """Run one pass over `entries` to its end and time its parts. The sequences stand afterwards where they stood."""
    with rewound(entries):
        watch.marks = []
        start = time.perf_counter()
        watch.mark("start")
        running = runner.begin(entries, split)
        parts: list[tuple[str, float]] = []
        if runner.replays:
            begun = time.perf_counter()
            hold(runner.device)
            watch.marks = []
            watch.mark("start")
            first = time.perf_counter()
            running.advance()  # launches, and waits for nothing
            parts.append((HOST, begun - start + time.perf_counter() - first))
        run_to_end(running)
        watch.mark("logits")
        sample_greedily(running)
        watch.mark("end")
    names = [name for name, _ in watch.marks]
    for name, following, seconds in zip(names, names[1:], watch.intervals(), strict=False):
        part = {"logits": "tail", "end": "sample"}.get(following) or PARTS[name]
        parts.append((part, seconds))
    return PassTimes(tuple(parts), tuple(map(tuple, running.routing)))
