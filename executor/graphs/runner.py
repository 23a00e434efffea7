"""A Runner whose short passes are replayed from pieces that were recorded once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from transformers import PreTrainedModel

from qllm.executor.errors import PassError
from qllm.executor.gpu.pass_inputs import SPLIT, DeviceInputs, HostInputs, PromptPart, Scratch
from qllm.executor.graphs.buckets import DECODE, Bucket, bucket_of, buckets
from qllm.executor.graphs.pieces import GraphRecorder, Piece, Recorder
from qllm.executor.model.attention_plan import fill
from qllm.executor.model.info import memory_bytes
from qllm.executor.model.kv_cache import Rings
from qllm.executor.model.packed_batch import Batch
from qllm.executor.model.passes import Point, RunAhead, RunningPass
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split, Splitter, whole
from qllm.executor.quantised.experts import experts_form

Graphs = Literal["load", "use", "off"]
GRAPHS: tuple[Graphs, ...] = ("load", "use", "off")
COPIES = 2  # of a bucket: one may be suspended while another pass needs it
MEMORY_SHARE = 0.05  # of the device's memory, for what recorded passes keep ...
FREE_SHARE = 0.4  # ... and of what is free before: passes that run eagerly need the rest

ROUNDING = 0.02  # of the largest logit: by what other kernels may round otherwise, in 16 bits

log = logging.getLogger(__name__)

#: called with (passes recorded, passes to record)
Progress = Callable[[int, int], None]


class Recorded:
    """The pieces of one bucket's pass, with the memory that they read and write. One pass at a time uses it."""

    def __init__(self, inputs: DeviceInputs, pieces: list[tuple[Point | None, Piece]], done: RunningPass):
        self.inputs = inputs
        self.free = True
        self._pieces = pieces  #: each with the point before it
        self._logits = done.logits
        self._routed = list(done.routed)
        self._last_layer = done.layer

    def replay(self, running: RunningPass, host: HostInputs, rows: int) -> torch.Tensor:
        """Run the pieces over these inputs, with the points of the recorded pass; the first `rows` rows of logits."""
        self.inputs.load(host)
        routed = iter(self._routed)
        for point, piece in self._pieces:
            if point is not None:
                if point.stage == "experts":
                    running.routed.append(next(routed))
                running.layer = point.layer
                running.reach(point.stage, point.number)
            piece.replay()
        running.layer = self._last_layer
        return self._logits[:rows].clone()  # another pass may come before anybody has read them


class GraphRunner(Runner):
    """A Runner that replays what fits a bucket; what is cut, merged or too large runs eagerly.

    A pass takes the same kernels over the same padded rows whether it is replayed or, where suspended passes have taken
    all copies of its bucket, runs eagerly: so it has the same bits.

    Args:
        model: see Runner.
        kv_blocks: see Runner.
        block_size: see Runner.
        splitter: see Runner.
        graphs: "load": `record_all` records all buckets before anything is served; "use": each at its first use;
            "off": none.
        max_seqs: most sequences in a pass.
        kernels: see Runner.
        rings: see Runner.
        recorder: makes what records one pass; by default CUDA graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_blocks: int,
        block_size: int = 16,
        splitter: Splitter = whole,
        *,
        graphs: Graphs = "load",
        max_seqs: int = 32,
        kernels: bool | None = None,
        rings: Rings | None = None,
        recorder: Callable[[], Recorder] | None = None,
    ):
        super().__init__(model, kv_blocks, block_size, splitter, kernels=kernels, rings=rings)
        self.recorded: dict[Bucket, list[Recorded]] = {}
        # The state of a sequence has no fixed address, what is called for one at a time no fixed number of calls, and
        # of quantised experts the host must know who goes where.
        eager = self.recurrent or self.unpacked or experts_form(model) != "plain" or not self.kernels
        self.graphs = "off" if eager else graphs
        self._max_seqs = max_seqs
        self._scratch = Scratch(self.cache.zero_slot // SPLIT + DECODE[-1])
        self._recorder = recorder

    def place(self, batch: Batch, split: Split, *, queues: bool) -> Callable[[RunningPass], torch.Tensor]:
        fits = self.graphs != "off" and not queues and self._is_whole(split) and self._records(batch)
        bucket = bucket_of(batch, self._max_seqs) if fits else None
        if bucket is None:
            return super().place(batch, split, queues=queues)
        if self.graphs == "use" and bucket not in self.recorded:
            self._record_one(bucket)
        batch.make_room(bucket.decode)
        room = bucket.room(batch.table_blocks(), rings=self.cache.rings is not None)
        host = HostInputs(room, self.device)
        fill(batch, host, 1)
        return partial(self._run, bucket=bucket, host=host)

    def _records(self, batch: Batch) -> bool:
        # Of prompts latents are expanded, and how many depends on their context; so it is where a chunk is too long for
        # its rows to be written before they attend.
        rings, most = self.cache.rings, max((e.n for e in batch.entries), default=0)
        in_place = rings is None or most + rings.window - 1 <= self.cache.ring_tokens
        return in_place and (not self.latent or batch.rows == batch.n_decode)

    def _is_whole(self, split: Split) -> bool:
        return 0 < self.n_experts <= split.experts_per_group and split.query_blocks <= 1

    def _run(self, running: RunningPass, bucket: Bucket, host: HostInputs) -> torch.Tensor:
        """Compute a pass, by replay if a copy of its bucket is free."""
        batch, rows = running.batch, len(running.sampled)
        recorded = next((each for each in self.recorded.get(bucket, ()) if each.free), None)
        if recorded is not None:
            recorded.free = False
            try:
                return recorded.replay(running, host, rows)
            finally:  # at its end, and where it fails or is closed between two pieces
                recorded.free = True
        inputs = DeviceInputs(host.room, self.device)
        inputs.load(host)
        self._read(batch, bucket, inputs)
        return self.forward(running)[:rows]

    def _read(self, batch: Batch, bucket: Bucket, inputs: DeviceInputs) -> None:
        """Let a pass compute all rows of its bucket, padding included."""
        batch.read_from(inputs)
        if bucket.prompts:
            batch.has_idle_rows = True
            first, last = bucket.decode, bucket.decode + bucket.prompts
            batch.prompt_parts = (PromptPart(0, first, last, 0, 0, first, first, (0, inputs.room.tiles)),)

    def record_all(self, progress: Progress | None = None) -> None:
        """Record all buckets, COPIES times, as long as the memory that they keep is within its share."""
        if self.graphs != "load":
            return
        todo = [b for b in buckets(self._max_seqs) if not (self.latent and b.prompts)] * COPIES
        before, start = self._free_bytes(), time.monotonic()
        most = min(MEMORY_SHARE * memory_bytes(self.device)[1], FREE_SHARE * before)
        for number, bucket in enumerate(todo):
            if progress is not None:
                progress(number, len(todo))
            if not self._record_one(bucket):
                break
            used = before - self._free_bytes()
            if used > most:
                log.warning("recorded passes keep %d MiB; the others run eagerly", used >> 20)
                break
        if progress is not None:
            progress(len(todo), len(todo))
        kept = sum(map(len, self.recorded.values()))
        took = time.monotonic() - start
        log.info("recorded %d passes in %.1f s, %d MiB", kept, took, (before - self._free_bytes()) >> 20)

    def _free_bytes(self) -> int:
        return memory_bytes(self.device)[0] if self.device.type == "cuda" else 0

    def _record_one(self, bucket: Bucket) -> bool:
        """Record a pass of that bucket; where the model does not allow it, no pass is recorded from now on."""
        try:
            with torch.inference_mode():
                self.recorded.setdefault(bucket, []).append(self.record(bucket))
        except torch.OutOfMemoryError:
            log.warning("no memory to record more passes; they run eagerly")
            return False
        except (RuntimeError, PassError) as error:
            first = (str(error).splitlines() or [""])[0]
            log.warning("passes cannot be recorded, and run eagerly: %s: %s", type(error).__name__, first)
            self.graphs = "off"
            self.recorded.clear()
            return False
        return True

    def record(self, bucket: Bucket) -> Recorded:
        """Record a pass of that bucket, over padding alone."""
        rings, most = self.cache.rings is not None, self.cache.n_blocks
        room = bucket.room(
            2 * most if rings else most, rings=rings
        )  # a table of a ring is as long as the other, at most
        inputs = DeviceInputs(room, self.device)
        inputs.scratch = self._scratch
        inputs.load(HostInputs(room, self.device))
        if self._recorder is None:
            self._recorder = graph_recorders(self.device)
        recorder = self._recorder()
        pieces: list[tuple[Point | None, Piece]] = []
        with recorder.recording():
            # Run once before: kernels are compiled, and libraries make their workspaces.
            eager = run_to_end(self._padding(bucket, inputs))
            running = self._padding(bucket, inputs)
            while not running.done:
                before = running.point
                piece, _ = recorder.record(running.advance)
                pieces.append((before, piece))
        for _, piece in pieces:
            piece.replay()
        compare(running.logits, eager)
        return Recorded(inputs, pieces, running)

    def _padding(self, bucket: Bucket, inputs: DeviceInputs) -> RunningPass:
        batch = Batch([], self.cache, padding=True)
        self._read(batch, bucket, inputs)
        return RunningPass(batch, whole(batch), self.forward, RunAhead(torch.device("cpu")), self.windows)


def compare(replayed: torch.Tensor, eager: torch.Tensor) -> None:
    """Raise PassError unless a recorded pass gives, when it is replayed, what it gave eagerly; warn of other bits."""
    near = ROUNDING * float(eager.float().abs().max())
    if not torch.allclose(replayed.float(), eager.float(), rtol=0, atol=near, equal_nan=True):
        raise PassError("its logits are others when it is replayed")
    if not torch.allclose(replayed, eager, rtol=0, atol=0, equal_nan=True):
        log.warning("a pass has other last bits when it is replayed than eagerly")


def graph_recorders(device: torch.device) -> Callable[[], Recorder]:
    """Recorders of CUDA graphs, all on one stream."""
    if device.type != "cuda":
        raise PassError(f"passes are recorded as CUDA graphs; the model is on {device}")
    return partial(GraphRecorder, torch.cuda.Stream(device))
