"""The passes of a calibration, run in rounds on one model."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from qllm.executor.calibration.grid import PassKind, mixed_lengths
from qllm.executor.calibration.stopwatch import (
    DECODING,
    Entries,
    Entry,
    PassTimes,
    fill_cache,
    measure,
    preceding_pass,
    random_entries,
    rewound,
    seconds_of,
)
from qllm.executor.calibration.store import MeasurementStore
from qllm.executor.calibration.timed_runner import TimedRunner
from qllm.executor.engine.hook_clock import Stopwatch, timed
from qllm.executor.model.info import ring_size
from qllm.executor.model.kv_cache import Rings
from qllm.executor.model.runner import has_kernels, run_to_end, window_of
from qllm.executor.model.split import Split

BLOCK = 16  # KV slots in a block
ROUND_S = 0.3  # a round repeats a pass about so long in all ...
OFTEN = 8  # ... and at most so many times; short passes vary more and are cheap to repeat
ROUNDS = (2, 12)  # at least, at most
PRECISION = 0.02  # half the 95 % interval of the median; further rounds until it is below for all kinds of passes ...
SAMPLING_S = 115.0  # ... or until so much time was spent, of which an accelerator ...
ACCELERATOR_S = 35.0  # ... gets so much: its times scatter less, and it compiles and records before
MOVED = 1024  # tokens whose KV is moved to the host and back ...
ACCELERATOR_MOVED = 1 << 27  # ... from an accelerator at least so many bytes: a few layers' KV takes less than a launch
SHORT = 5  # repeats of what is measured once
GOLDEN = (5**0.5 - 1) / 2

#: called with (passes measured, passes planned)
Progress = Callable[[int, int], None]


class Profiler:
    """Measures passes over random prompts on one model, up to `max_batch` sequences in `kv_tokens` KV slots.

    They run as they are served: by an accelerator's kernels where there are some, those that fit a bucket replayed.
    """

    def __init__(self, model: PreTrainedModel, kv_tokens: int, max_batch: int):
        blocks, rings = -(-kv_tokens // BLOCK) + max_batch + 1, rings_for(model, max_batch)
        self.runner = TimedRunner(model, blocks, BLOCK, max_batch, rings=rings)
        with torch.inference_mode():
            fill_cache(self.runner)
        self.model = model
        self.sampled = Counter[PassKind]()

    def sequences(self, kind: PassKind) -> Entries:
        """The sequences of a pass, of different lengths, as in serving (`mixed_lengths`)."""
        # Each repeat has other tokens, so that the mean is over many routings. The same repeat of a whole pass and of a
        # split one has the same.
        positions = self.runner.max_positions
        most = None if positions is None else positions - kind.new
        sizes = [(kind.new, context) for context in mixed_lengths(kind.context, kind.sequences, most)]
        return random_entries(self.runner, sizes, (*kind[:3], self.sampled[kind]))

    def measure(self, kinds: list[PassKind], store: MeasurementStore, progress: Progress | None = None) -> None:
        """Measure every kind of pass in rounds, so that a disturbance does not hit all repeats of one."""
        # How often a round repeats a kind is settled beforehand by how long it takes. A further round repeats all
        # kinds, not only those that scatter: re-measuring only slow samples biases the mean. What `store` holds is not
        # repeated.
        limit = SAMPLING_S if self.runner.device.type == "cpu" else min(SAMPLING_S, ACCELERATOR_S)
        with torch.inference_mode(), self.timed() as watch:
            if self.runner.kernels:  # what is compiled and recorded at a first use says nothing about later ones
                for kind in kinds:
                    self.sample(kind, watch)
            took = {kind: self.sample(kind, watch).seconds for kind in kinds}  # kernels are made at their first use
            often = {kind: max(1, min(OFTEN, int(ROUND_S / took.get(kind.baseline, took[kind])))) for kind in kinds}
            order = spread(often)
            done, spent = sum(store.repeats(kind) for kind in kinds), 0.0
            for number in range(ROUNDS[1]):
                further = number >= ROUNDS[0]
                if further and all(store.samples[kind.key].uncertainty() < PRECISION for kind in kinds):
                    return
                for kind, turn in order:
                    if store.repeats(kind) > number * often[kind] + turn:
                        continue
                    if further and spent > limit:
                        return
                    start = time.perf_counter()
                    store.add(kind, self.sample(kind, watch))
                    spent += time.perf_counter() - start
                    done += 1
                    if progress is not None:
                        progress(done, max(ROUNDS[0], number + 1) * len(order))

    @contextmanager
    def timed(self) -> Iterator[Stopwatch]:
        """The clock of `qllm.executor.engine.hook_clock.timed`, also in passes that are replayed."""
        with timed(self.model) as watch:
            self.runner.watch = watch
            try:
                yield watch
            finally:
                self.runner.watch = None

    def sample(self, kind: PassKind, watch: Stopwatch) -> PassTimes:
        """A repeat of a kind of pass, after one that may run before it in serving (`preceding_pass`)."""
        entries = self.sequences(kind)
        self.sampled[kind] += 1
        split = Split(kind.experts_per_group, kind.query_blocks)
        measure(self.runner, watch, preceding_pass(self.runner, entries, kind.preceding_prompt), split)
        watch.forced_experts = kind.forced_experts
        passed = measure(self.runner, watch, entries, split)
        watch.forced_experts = 0
        return passed

    def switch_seconds(self) -> float:
        """What one suspension and its resumption cost (seconds)."""
        # A prefill is suspended before each layer's attention for a decode pass of another sequence. What both take for
        # themselves is taken off; the least of several runs each.
        new = min(256, self.runner.cache.n_blocks * BLOCK // 4)
        long, short = self.sequences(PassKind(1, new, 0))[0], self.sequences(PassKind(1, 1, new))[0]
        short[0].blocks = [block + -(-new // BLOCK) for block in short[0].blocks]
        short[0].ring = self.runner.cache.ring_of(new + 1, number=1)
        for entry in (long, short):  # what is made at a first use is made here
            self._run(entry)
        stops = 0

        def interleaved() -> None:
            nonlocal stops
            stops = 0
            with rewound([long]):
                running = self.runner.begin([long])
                while (point := running.advance()) is not None:
                    if point.stage == "attention":
                        stops += 1
                        self._run(short)

        def least(what: Callable[[], None]) -> float:
            return min(seconds_of(self.runner.device, what) for _ in range(4 * SHORT))

        both, one, two = least(interleaved), least(lambda: self._run(long)), least(lambda: self._run(short))
        return max(0.0, (both - one - stops * two) / stops)

    def _run(self, entry: Entry) -> None:
        """A pass over one sequence."""
        with rewound([entry]):
            run_to_end(self.runner.begin([entry]))

    def bandwidth(self) -> float:
        """Bytes per second at which the KV of a sequence moves between the device and host memory."""
        cache = self.runner.cache
        most = MOVED if self.runner.device.type == "cpu" else max(MOVED, ACCELERATOR_MOVED // cache.token_bytes())
        tokens = min(most, cache.n_blocks * BLOCK)
        blocks, ring = list(range(-(-tokens // BLOCK))), cache.ring_of(tokens)
        rates = []
        for _ in range(SHORT + 1):
            moved = 0

            def there_and_back() -> None:
                nonlocal moved
                host = cache.offload(blocks, tokens, ring)
                cache.restore(host, blocks, ring)
                moved = 2 * host.nbytes

            seconds = seconds_of(self.runner.device, there_and_back)
            rates.append(moved / seconds)
        return statistics.median(rates[1:])


def rings_for(model: PreTrainedModel, max_batch: int) -> Rings | None:
    """Rings for the sequences of each pass, where layers of `model` keep a window alone."""
    window = window_of(model) or 0
    size = ring_size(window, BLOCK, kernels=has_kernels(model.device))
    return Rings(size * max(max_batch, DECODING), size, window) if size else None


def spread(often: dict[PassKind, int]) -> list[tuple[PassKind, int]]:
    """A round: each kind so often, evenly spread, as (kind, which of its repeats); kinds of one baseline together."""
    # What these differ by is small, and must not come from the machine.
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kind.baseline for kind in often))}
    at = [
        ((turn + places[kind.baseline] * GOLDEN % 1) / times, places[kind.baseline], kind, turn)
        for kind, times in often.items()
        for turn in range(times)
    ]
    return [(kind, turn) for _, _, kind, turn in sorted(at)]
