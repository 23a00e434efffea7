"""The passes of a calibration, run in rounds on one model."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qllm.executor.calibration.grid import Cell, mixed_lengths
from qllm.executor.calibration.stopwatch import (
    Entries,
    Entry,
    PassTimes,
    Stopwatch,
    fill_cache,
    measure,
    random_entries,
    runs_before,
    timed,
)
from qllm.executor.calibration.store import Kept
from qllm.executor.model.packed_batch import Batch
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split

BLOCK = 16  # KV slots in a block
ROUND_S = 0.3  # a round repeats a pass about so long in all ...
OFTEN = 8  # ... and at most so many times; the machine's speed meets a short pass harder, and hardly costs to see
ROUNDS = (2, 12)  # at least, at most
PRECISION = 0.02  # half the 95 % interval of the median; further rounds until it is below for all kinds of passes ...
VISITS_S = 115.0  # ... or so much time went into visits
SHORT = 5  # repeats of what is measured once
GOLDEN = (5**0.5 - 1) / 2


class Visit(NamedTuple):
    """One repeat of a kind of pass. done: visits until now, this one included; planned: in all."""

    done: int
    planned: int
    cell: Cell
    seconds: float


class Bench:
    """The runner, its KV and the random prompts that calibration measures with."""

    def __init__(self, model: PreTrainedModel, kv_tokens: int, max_batch: int):
        self.split = Split()
        self.runner = Runner(model, -(-kv_tokens // BLOCK) + max_batch + 1, BLOCK, splitter=self.splitter)
        with torch.inference_mode():
            fill_cache(self.runner)
        self.model = model
        self.visited = Counter[Cell]()

    def splitter(self, batch: Batch) -> Split:
        """The cut that the next pass is to have."""
        return self.split

    def sequences(self, cell: Cell) -> Entries:
        """Random tokens, others in each visit, so that the mean is over many routings; the same for each cut. What is
        cached before them is random KV, which takes as long to attend to as any. Sequences that decode together are of
        different lengths, as in serving: from half of the cell's context to one and a half."""
        positions = self.runner.max_positions
        most = None if positions is None else positions - cell.new
        sizes = [(cell.new, context) for context in mixed_lengths(cell.context, cell.sequences, most)]
        return random_entries(self.runner, sizes, (*cell[:3], self.visited[cell]))

    def visits(self, grid: list[Cell], kept: Kept, rounds: tuple[int, int]) -> Iterator[Visit]:
        """Measure every kind of pass in rounds (at least, at most), one repeat at a visit, so that a disturbance does
        not hit all repeats of one. Yields each visit; in between the model may be used for something else.

        How often a round visits a kind is settled beforehand by how long it takes; a further round visits all kinds,
        not only those that scatter: who visits again what was slow, and leaves what was fast, ends up with a machine
        that is faster than it is.
        """
        with torch.inference_mode(), timed(self.model) as watch:
            took = {cell: self.visit(cell, watch).seconds for cell in grid}  # kernels are made at their first use
        often = {cell: max(1, min(OFTEN, int(ROUND_S / took.get(cell.plain, took[cell])))) for cell in grid}
        order = spread(often)
        done, spent = sum(kept.repeats(cell) for cell in grid), 0.0
        for number in range(rounds[1]):
            if number >= rounds[0] and all(kept.cells[cell.key].uncertainty() < PRECISION for cell in grid):
                return
            for cell, turn in order:
                if kept.repeats(cell) > number * often[cell] + turn:
                    continue
                if number >= rounds[0] and spent > VISITS_S:
                    return
                start = time.perf_counter()
                with torch.inference_mode(), timed(self.model) as watch:
                    passed = self.visit(cell, watch)
                kept.add(cell, passed, time.time())
                spent += time.perf_counter() - start
                done += 1
                yield Visit(done, max(rounds[0], number + 1) * len(order), cell, passed.seconds)

    def visit(self, cell: Cell, watch: Stopwatch) -> PassTimes:
        """A repeat of a kind of pass, after one that may run before it in serving (`runs_before`)."""
        entries = self.sequences(cell)
        self.visited[cell] += 1
        self.split = Split(cell.group, cell.pieces)
        measure(self.runner, watch, runs_before(self.runner, entries, cell.after))
        watch.steer = (lambda index, experts: steered(index, cell.hot)) if cell.hot else None
        passed = measure(self.runner, watch, entries)
        watch.steer = None
        return passed

    def switch_seconds(self) -> float:
        """What one suspension and its resumption cost: a prefill that is suspended before the attention of each layer
        for a decode pass of another sequence, against both for themselves. The least of several runs each."""
        self.split = Split(1 << 30, 1)
        new = min(256, self.runner.cache.n_blocks * BLOCK // 4)
        long, short = self.sequences(Cell(1, new, 0))[0], self.sequences(Cell(1, 1, new))[0]
        short[0].blocks = [block + -(-new // BLOCK) for block in short[0].blocks]
        stops = 0

        def interleaved() -> None:
            nonlocal stops
            stops = 0
            running = self.runner.begin([long])
            while (point := running.advance()) is not None:
                if point.stage == "attention":
                    stops += 1
                    self._once(short)
            long[0].computed = 0

        def alone() -> None:
            self._once(long)

        def other() -> None:
            self._once(short)

        both, one, two = (min(self._seconds(what) for _ in range(4 * SHORT)) for what in (interleaved, alone, other))
        return max(0.0, (both - one - stops * two) / stops)

    def _once(self, entry: Entry) -> None:
        before = entry[0].computed
        run_to_end(self.runner.begin([entry]))
        entry[0].computed = before

    def bandwidth(self) -> float:
        """Bytes per second at which the KV of a sequence moves between the device and host memory."""
        tokens = min(1024, self.runner.cache.n_blocks * BLOCK)
        blocks = list(range(-(-tokens // BLOCK)))
        rates = []
        for _ in range(SHORT + 1):
            moved = 0

            def there_and_back() -> None:
                nonlocal moved
                host = self.runner.cache.offload(blocks, tokens)
                self.runner.cache.restore(host, blocks)
                moved = 2 * host.nbytes

            seconds = self._seconds(there_and_back)
            rates.append(moved / seconds)
        return statistics.median(rates[1:])

    def _seconds(self, what: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        what()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)


def spread(often: dict[Cell, int]) -> list[tuple[Cell, int]]:
    """A round of visits: each kind so often, evenly spread, as (cell, which of its visits in this round). Kinds of one
    `plain` kind follow each other: the machine's speed has little time to change, and what they differ by is small."""
    places = {plain: place for place, plain in enumerate(dict.fromkeys(cell.plain for cell in often))}
    at = [
        ((turn + places[cell.plain] * GOLDEN % 1) / times, places[cell.plain], cell, turn)
        for cell, times in often.items()
        for turn in range(times)
    ]
    return [(cell, turn) for _, _, cell, turn in sorted(at)]


def steered(index: torch.Tensor, hot: int) -> torch.Tensor:
    """Top-k indices like `index` `[T, k]` that send all tokens to the first `hot` experts in turn."""
    rows, k = index.shape
    flat = torch.arange(rows * k, device=index.device, dtype=index.dtype)
    return (flat % hot).view(rows, k)
