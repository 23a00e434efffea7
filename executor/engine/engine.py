"""The engine: serves requests with one MoE model, preempted between two experts by the scheduler."""

from __future__ import annotations

import atexit
import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from qllm.executor.checks import check_seconds
from qllm.executor.cpu.openmp import release_team
from qllm.executor.engine.block_manager import fitted
from qllm.executor.engine.clock import Clock, RealClock, predictor
from qllm.executor.engine.execution import execution_of
from qllm.executor.engine.frontend import Frontend
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.step_costs import measured_splitter
from qllm.executor.engine.text import Tokenizer, load_tokenizer
from qllm.executor.engine.warm_up import warm_up
from qllm.executor.errors import EngineClosed, ExecutorError, KVMemoryError, SamplingError
from qllm.executor.graphs.runner import GRAPHS, GraphRunner, Graphs, Progress
from qllm.executor.model.info import make_cache, model_facts
from qllm.executor.model.loading import load_model, prepare_model
from qllm.executor.model.split import LinearSplitter, Splitter
from qllm.executor.sampling.params import SamplingParams, is_whole
from qllm.scheduler import Limits, Policy, Scheduler, SchedulerError, make_policy

T = TypeVar("T")

log = logging.getLogger(__name__)

THREAD = "qllm-engine"  # the name of each engine's thread
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # as generation configurations call them


def check_settings(
    policy: Any, limits: Any, kv_memory: Any, max_step: Any, seed: Any, graphs: Any, max_waiting: Any
) -> None:
    """Raise a typed error for an argument of Engine that is of another type than allowed, or out of its range."""
    if not isinstance(policy, str | Policy):
        raise SchedulerError(f"policy is {policy!r:.80}; allowed: the name of a policy, or a Policy")
    if limits is not None and not isinstance(limits, Limits):
        raise SchedulerError(f"limits is {limits!r:.80}; allowed: None, or Limits")
    if kv_memory is not None and (not is_whole(kv_memory) or not 1 <= kv_memory < 1 << 62):
        raise KVMemoryError(f"kv_memory is {kv_memory!r:.80}; allowed: None, or a whole number of bytes")
    if isinstance(max_step, bool) or not isinstance(max_step, int | float) or not 1e-9 <= max_step <= 1e9:
        raise ExecutorError(f"max_step is {max_step!r:.80}; allowed: seconds from 1e-9 to 1e9")
    if seed is not None and (not is_whole(seed) or not 0 <= seed < 2**64):
        raise SamplingError(f"seed is {seed!r:.80}; allowed: None, or a whole number between 0 and 2**64 - 1")
    if max_waiting is not None and (not is_whole(max_waiting) or max_waiting < 1):
        raise ExecutorError(f"max_waiting is {max_waiting!r:.80}; allowed: None, or a whole number, 1 or more")
    if graphs not in GRAPHS:
        raise ExecutorError(f"graphs is {graphs!r:.80}; allowed: {', '.join(GRAPHS)}")


def sampling_defaults(model: PreTrainedModel) -> dict[str, Any]:
    """What the checkpoint's generation configuration says of sampling, where it does not say `do_sample: false`.

    What is outside its range is ignored, with a warning.
    """
    given = getattr(model, "generation_config", None)
    sampled = getattr(given, "do_sample", None)
    values = {name: getattr(given, name, None) for name in DEFAULTS} if sampled is not False else {}
    if sampled and values["temperature"] is None:
        values["temperature"] = 1.0  # as in transformers
    found: dict[str, Any] = {}
    for name, value in values.items():
        try:
            if value is not None:
                SamplingParams(**{name: value})
                found[name] = value
        except SamplingError as error:
            log.warning("default of the checkpoint ignored: %s", error)
    return found


@dataclass(frozen=True)
class Stats:
    """The engine at one moment.

    Attributes:
        requests: in the system.
        waiting: of these, in a prefill queue.
        passes: launched so far.
        suspended_passes: suspended now.
        suspended_tokens: tokens in these passes.
        suspended_bytes: bytes of the activations that they hold.
        free_blocks: free KV blocks.
        total_blocks: all KV blocks.
        host_bytes: bytes of KV in host memory.
    """

    requests: int
    waiting: int
    passes: int
    suspended_passes: int
    suspended_tokens: int
    suspended_bytes: int
    free_blocks: int
    total_blocks: int
    host_bytes: int


class Engine(Frontend):
    """Serves one model. Any thread may `submit`; `close()` it, or use it as a context manager.

    Args:
        model: a causal MoE model; prepared here where it is not yet (`qllm.executor.load_model`).
        tokenizer: for prompts given as text, and for the text of tokens.
        policy: a name in `qllm.scheduler.POLICIES`, or a policy.
        limits: what the scheduler may use; without `kv_blocks`, as many as fit a share of the free memory.
        kv_memory: bytes for KV, in place of `limits.kv_blocks`.
        clock: real time by default.
        splitter: how passes are split (`qllm.executor.model.split`), unless the clock's step model does it. By default
            by linear step times: a CPU's, and on a GPU those that it takes, measured here.
        max_step: seconds that no step should exceed, for the default splitter.
        seed: of requests that bring none.
        graphs: when a GPU records short passes as CUDA graphs: "load": here; "use": at a first use; "off": never.
        max_waiting: requests that may wait for their first pass; beyond, `submit` raises EngineBusy. None: no bound.
        progress: called while they are recorded here, with (passes recorded, passes to record).

    Attributes:
        limits: what the scheduler may use, KV blocks included.
        clock: what time it is.
        vocabulary: number of token ids.

    Raises:
        UnsupportedModelError: the model cannot be served.
        ExecutorError: `max_step`, `seed` or `max_waiting` is none.
        SchedulerError: the policy or the limits are not possible.
        KVMemoryError: the KV blocks, or a single one, do not fit the memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None = None,
        *,
        policy: str | Policy = "slack",
        limits: Limits | None = None,
        kv_memory: int | None = None,
        clock: Clock | None = None,
        splitter: Splitter | None = None,
        max_step: float = 0.01,
        seed: int | None = None,
        graphs: Graphs = "load",
        max_waiting: int | None = None,
        progress: Progress | None = None,
    ):
        check_settings(policy, limits, kv_memory, max_step, seed, graphs, max_waiting)
        model = model if model.config._attn_implementation == "qllm" else prepare_model(model)
        super().__init__(model, tokenizer, sampling_defaults(model), seed, max_waiting)
        self.clock: Clock = clock or RealClock()
        facts = model_facts(model)
        given = limits or Limits()
        self.limits, rings = fitted(model, facts, given, kv_memory)
        given, blocks = self.limits, self.limits.blocks
        shape = facts["experts"], facts["top_k"]
        policy = make_policy(policy) if isinstance(policy, str) else policy
        self.scheduler = Scheduler(policy, given, predictor(self.clock))
        splits = splitter or LinearSplitter(*shape, max_step=max_step)
        settings: dict[str, Any] = {"graphs": graphs, "max_seqs": given.max_seqs, "rings": rings}
        self._runner = GraphRunner(model, blocks, given.block_size, splits, **settings)
        make_cache(self._runner, facts["kv_bytes_per_token"], facts["window_bytes_per_token"])
        if splitter is None and self.clock.steps is None and self._runner.device.type == "cuda":
            most = given.max_batched_tokens
            self._runner.splitter = measured_splitter(self._runner, *shape, max_step, most_rows=most)
        if not (self.scheduler.policy.merge or self.clock.asks_queues):  # then no pass is replayed
            self._runner.record_all(progress)
        self._loop = Loop(self._runner, self.scheduler, self.clock)
        if model.device.type == "cpu" and any(thread.name == THREAD for thread in threading.enumerate()):
            warnings.warn(
                "another engine of this process computes on the CPU: their OpenMP threads outnumber the cores, "
                "which slows both down; run one engine a process",
                RuntimeWarning,
                stacklevel=2,
            )
        release_team()  # this thread has prepared the model and is not going to compute any more
        log.info(
            "engine started: %s, %s, on %s, %d KV blocks of %d tokens, policy %s",
            *(model.config.model_type, facts["dtype"], model.device, blocks, given.block_size),
            type(self.scheduler.policy).__name__,
        )
        self._thread = threading.Thread(target=self._loop.run, name=THREAD, daemon=True)
        self._thread.start()
        _serving[self._thread] = self._loop
        if self._runner.device.type == "cuda":
            self.call(lambda loop: warm_up(loop.runner, given.max_batched_tokens))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        experts: str = "plain",
        **settings: Any,
    ) -> Engine:
        """An engine for a Hugging Face checkpoint, with the checkpoint's tokenizer where it has one.

        Args:
            name_or_path: a folder, or a name on the hub.
            device: where the model is to run.
            dtype: of the weights; "auto" for that of the checkpoint.
            trust_remote_code: whether code that comes with the checkpoint may run.
            experts: "plain", "packed" or "nf4", see `load_model`.
            settings: the other arguments of Engine.

        Raises:
            UnsupportedModelError: the model cannot be served.
            LoadError: the checkpoint or its tokenizer cannot be loaded.
            SchedulerError: the policy or the limits are not possible.
            KVMemoryError: the KV blocks, or a single one, do not fit the memory.
        """
        tokenizer = load_tokenizer(name_or_path, trust_remote_code)
        given: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        model = load_model(name_or_path, experts=experts, **given)
        return cls(model, tokenizer, **settings)

    def call(self, function: Callable[[Loop], T]) -> T:
        """Have the engine's thread call `function` with its loop at the next preemption point, and wait for it.

        Returns:
            What the function returns.

        Raises:
            EngineClosed: the engine was closed, or broke.
            BaseException: what the function raises.
        """
        answer: Future[T] = Future()

        def message() -> None:
            try:
                answer.set_result(function(self._loop))
            except BaseException as error:
                answer.set_exception(error)

        self._loop.send(message)
        return answer.result()

    @property
    def alive(self) -> bool:
        """Whether it serves: not once it was closed, or broke."""
        return self._thread.is_alive()

    def stats(self) -> Stats:
        """Where the engine stands, at its next preemption point. Raises EngineClosed."""
        return self.call(_stats)

    def close(self, *, drain: float | None = 0.0) -> None:
        """End all requests (with EngineClosed) and the engine's thread. Idempotent.

        Args:
            drain: seconds that the requests in the system may take to end by themselves first; None: all that they
                take. No new ones are let in meanwhile.

        Raises:
            RequestError: `drain` is no number of seconds.
        """
        check_seconds("drain", drain, zero=True)
        self._desk.close(drain)
        with suppress(EngineClosed):
            self._loop.send(self._loop.stop)
        self._thread.join()
        _serving.pop(self._thread, None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_serving: dict[threading.Thread, Loop] = {}  # of engines that were not closed


@atexit.register
def _close_all() -> None:
    """End all engines before the interpreter does: a thread inside PyTorch would then abort the process."""
    for thread, loop in list(_serving.items()):
        with suppress(EngineClosed):
            loop.send(loop.stop)
        thread.join()


def _stats(loop: Loop) -> Stats:
    s = loop.scheduler
    return Stats(
        requests=len(s.requests),
        waiting=len(s.waiting),
        passes=s.passes,
        suspended_passes=len(s.suspended_passes),
        suspended_tokens=sum(p.tokens for p in s.suspended_passes),
        suspended_bytes=sum(execution_of(p).running.held_bytes() for p in s.suspended_passes),
        free_blocks=s.kv.free,
        total_blocks=s.kv.total,
        host_bytes=sum(sequence.host.nbytes for sequence in loop.sequences.values() if sequence.host is not None),
    )
