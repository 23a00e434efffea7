"""What the parts of `gpu.py` share: the model on its device, one engine at a time, sizes, and where figures go."""

from __future__ import annotations

import gc
import importlib
import inspect
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig

from gpu_parts.figures import LAYERS
from qllm.executor.calibration.environment import conditions, device_name, versions
from qllm.executor.engine.engine import Engine
from qllm.executor.errors import EngineClosed
from qllm.executor.model import packed_batch
from qllm.executor.model.loading import random_model
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split, Splitter, whole
from qllm.scheduler import Limits, make_policy

SHAPE: dict[str, Any] = {  # of Qwen3-30B-A3B
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 40_960,
}
TINY_SHAPE = SHAPE | {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
WEIGHTS_SHARE = 0.55  # of the device's free memory
BLOCK = 16  # tokens in a KV block
FEWEST, MOST = 3, 50  # samples of a time
MAX_STEP = 2e-3  # seconds that a step of the engine should not exceed, unless said otherwise
POLICY: dict[str, dict[str, Any]] = {"qllm": {"fill_tokens": 0}}  # an LS prefill runs alone


@dataclass(frozen=True)
class Sizes:
    """Tokens and requests of all parts; `seconds` that those may take which fill their time."""

    prompt: int = 128
    context: int = 512
    batch: int = 32
    long: int = 8192
    longest: int = 32_768
    kv_tokens: int = 65_536
    moved: int = 16_384
    stops: int = 1000
    requests: int = 64
    request_prompt: int = 256
    request_new: int = 128
    be_new: int = 8
    lone: int = 20
    families: int | None = None
    seconds: float = 1e9
    extent: tuple[int, int, int] = (2048, 4096, 32)


TINY = Sizes(12, 16, 4, 64, 96, 2048, 64, 20, 4, 8, 4, 2, 5, 2, 2.0, (2, 1, 2))


class NoTime(Exception):
    """The part's time was over before it had a figure."""


class World:
    """One device with one model. `send` takes what is told: ("figure", name, value, note) and ("fact", name, value)."""

    def __init__(self, tiny: bool, graphs: bool, send: Callable[[tuple[Any, ...]], None]):
        self.tiny = tiny
        self.sizes = TINY if tiny else Sizes()
        on_gpu = torch.cuda.is_available() and not tiny
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        if tiny:
            torch.set_num_threads(1)  # more take longer
        self.until = time.monotonic()  #: when the part that runs should end
        self._graphs = graphs  # whether they may be used
        self._send = send
        self._model: PreTrainedModel | None = None
        self._engine: Engine | None = None
        self._settings: tuple[Any, ...] = ()

    def say(self, name: str, value: float, note: str = "") -> None:
        self._send(("figure", name, float(value), note))

    def fact(self, name: str, value: Any) -> None:
        self._send(("fact", name, value))

    @property
    def left(self) -> float:
        """Seconds until the part should end."""
        return self.until - time.monotonic()

    def fill(self) -> None:
        """The part fills its time: end it early where everything is tiny."""
        self.until = min(self.until, time.monotonic() + self.sizes.seconds)

    # ---- the model and the engine ------------------------------------------------------------------------------

    def config(self, layers: int | None = None) -> Qwen3MoeConfig:
        shape = dict(TINY_SHAPE if self.tiny else SHAPE)
        return Qwen3MoeConfig(**shape | ({} if layers is None else {"num_hidden_layers": layers}))

    @property
    def model(self) -> PreTrainedModel:
        """The prepared model; made at first use."""
        if self._model is None:
            layers = self._layers()
            self._model = random_model(self.config(layers), torch.bfloat16, self.device)
            weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
            self.fact("layers", layers)
            self.fact("weights_gb", round(weights / 1e9, 2))
        return self._model

    def _layers(self) -> int:
        """As many as fit WEIGHTS_SHARE of the free memory, 48 at most."""
        if self.device.type == "cpu":
            return int(TINY_SHAPE["num_hidden_layers"] if self.tiny else LAYERS)
        c, width = self.config(), 2  # bytes of a number
        heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        layer = width * c.hidden_size * (3 * c.num_experts * c.moe_intermediate_size + heads)
        room = WEIGHTS_SHARE * torch.cuda.mem_get_info(self.device)[0] - width * 2 * c.vocab_size * c.hidden_size
        return max(1, min(LAYERS, int(room // layer)))

    def engine(
        self, policy: str = "qllm", *, max_step: float = MAX_STEP, graphs: str = "load", tokens: int | None = None
    ) -> Engine:
        """The engine with these settings, the only one; `tokens`: most in a pass."""
        graphs = graphs if self._graphs else "off"
        settings = (policy, max_step, graphs, tokens)
        if self._engine is not None and (settings != self._settings or not alive(self._engine)):
            self.close()
        if self._engine is None:
            limits = Limits(
                max_seqs=max(self.sizes.requests, self.sizes.batch),
                max_batched_tokens=tokens or self.sizes.long,
                kv_blocks=self.sizes.kv_tokens // BLOCK,
                block_size=BLOCK,
            )
            made = make_policy(policy, **POLICY.get(policy, {}))
            self._engine = self._made(graphs, policy=made, max_step=max_step, limits=limits, seed=0)
            self._settings = settings
        return self._engine

    def any_engine(self) -> Engine:
        """The engine that is there, or one with the usual settings."""
        return self._engine if self._engine is not None and alive(self._engine) else self.engine()

    def _made(self, graphs: str, **settings: Any) -> Engine:
        try:
            return Engine(self.model, **settings, **graph_setting(Engine, graphs))
        except Exception as error:
            if not graph_setting(Engine, graphs):
                raise
            self.fact("engine without graphs", one_line(error))
        return Engine(self.model, **settings, **graph_setting(Engine, "off"))

    def close(self) -> None:
        """End the engine, and give back what it held."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self.tidy()

    def tidy(self) -> None:
        """Give memory back that nobody holds. Raises RuntimeError where the device is broken."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    # ---- passes ------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tokens(self, n: int, seed: object = 0) -> list[int]:
        vocabulary = int(self.model.config.vocab_size)
        return random.Random(str(seed)).choices(range(3, vocabulary), k=n)

    def sequences(self, runner: Runner, sizes: Iterable[tuple[int, int]]) -> list[tuple[packed_batch.Sequence, int]]:
        """Entries of passes: (new, cached) tokens of each. They lie one after another in an idle engine's KV."""
        entries, first = [], 0
        for number, (new, cached) in enumerate(sizes):
            blocks = range(first, first - (-(new + cached) // BLOCK))
            first = blocks.stop
            ring = runner.cache.ring_of(new + cached, number)
            entries.append((packed_batch.Sequence(self.tokens(new + cached, number), [*blocks], ring=ring), new))
        waiting = [(seq, len(seq.tokens) - new) for seq, new in entries if len(seq.tokens) > new]
        while waiting:  # compute what is cached, in passes of a size that is served
            some = [waiting.pop()]
            while waiting and sum(n for _, n in some) + waiting[-1][1] <= self.sizes.long:
                some.append(waiting.pop())
            run_to_end(runner.begin(some))
        return entries

    def times(
        self, runner: Runner, entries: Sequence[tuple[packed_batch.Sequence, int]], split: Split | None = None
    ) -> tuple[list[float], int]:
        """Milliseconds of a pass over `entries` again and again, from an idle device to an idle one; its points."""
        found: list[float] = []
        points = 0
        for repeat in range(-2, MOST):  # the first ones warm up
            self.synchronize()
            start = time.perf_counter()
            running = runner.begin(entries, split)
            points = 0
            while running.advance() is not None:
                points += 1
            self.synchronize()
            if repeat >= 0 or self.left < 0:
                found.append(1e3 * (time.perf_counter() - start))
            rewind(entries)
            if self.left < 0 and len(found) >= FEWEST:
                break
        return found, points


def graph_setting(function: Callable[..., Any], graphs: str) -> dict[str, Any]:
    """{"graphs": graphs} where `function` knows it."""
    return {"graphs": graphs} if "graphs" in inspect.signature(function).parameters else {}


def make_runner(model: PreTrainedModel, kv_blocks: int, splitter: Splitter = whole, graphs: str = "use") -> Runner:
    """A runner of its own, with its KV; on a GPU it replays passes as graphs, where this version can."""
    made: Any = Runner
    if model.device.type == "cuda":
        with suppress(ImportError):
            made = importlib.import_module("qllm.executor.graphs.runner").GraphRunner
    runner: Runner = made(model, kv_blocks, BLOCK, splitter, **graph_setting(made, graphs))
    runner.make_cache()
    return runner


def rewind(entries: Iterable[tuple[packed_batch.Sequence, int]]) -> None:
    """The sequences stand again where they stood before a pass over all their known tokens."""
    for seq, new in entries:
        seq.computed = len(seq.tokens) - new


def alive(engine: Engine) -> bool:
    try:
        engine.stats()
    except EngineClosed:
        return False
    return True


def middle(values: Sequence[float]) -> float:
    """The median. Raises NoTime where there are none."""
    if not values:
        raise NoTime
    return statistics.median(values)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def machine(device: torch.device) -> dict[str, Any]:
    """What a run ran on: device, driver and clocks, versions, commit."""
    try:
        import triton

        found = {"triton": triton.__version__}
    except ImportError:
        found = {}
    root = Path(__file__).resolve().parents[2]
    commit = "unknown"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    return {"device": device_name(device), "commit": commit, **versions(), **found, **conditions(device)}
