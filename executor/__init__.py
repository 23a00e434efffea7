"""The executor: Hugging Face MoE models in PyTorch, every forward pass suspendable between two experts.

    from qllm.executor import Engine

    with Engine.from_pretrained("Qwen/Qwen3-30B-A3B", policy="slack", device="cuda", dtype="bfloat16") as engine:
        for token in engine.submit("Hello", max_new_tokens=32, priority=0):
            print(token.text, end="")

engine/         serves requests: the engine and its thread, clocks, replay of request traces
sampling/       chooses the next tokens from logits, on a CPU and on a device
graphs/         replays short passes on a GPU, piece by piece from point to point
model/          one model: loading and checks, the hooks, one pass in a greenlet, the KV cache
gpu/            kernels for attention and experts, and what a pass's kernels read; fused/: norms, rotary, gates
recurrent/      layers that keep a state of each sequence beside its KV
unpacked/       attention that is called for one sequence at a time
quantised/      experts in four bits
cpu/            what makes float32 on CPUs fast: packed weights, a kernel, huge pages
calibration/    measures a model's passes and writes a timing trace
errors.py       the errors of all of them
testing.py      models without a checkpoint: tiny ones of any family, a demo, one to compare engines on

Imports run downwards only: calibration, engine, graphs, model (with recurrent and unpacked, which hook its layers),
then gpu, quantised, cpu; sampling stands by itself. Each folder's text says what lies in it.
"""

if __name__ != "qllm.executor":
    raise ImportError("this package is called qllm.executor: from qllm.executor import ...")

import os
from typing import TYPE_CHECKING

from qllm._lazy import lazy

if TYPE_CHECKING:
    from qllm.executor.engine.clock import RealClock as RealClock
    from qllm.executor.engine.clock import VirtualClock as VirtualClock
    from qllm.executor.engine.engine import Engine as Engine
    from qllm.executor.engine.engine import Stats as Stats
    from qllm.executor.engine.replay import replay as replay
    from qllm.executor.engine.requests import RequestTimes as RequestTimes
    from qllm.executor.engine.requests import Token as Token
    from qllm.executor.engine.stream import Completion as Completion
    from qllm.executor.engine.stream import Stream as Stream
    from qllm.executor.engine.stream import Usage as Usage
    from qllm.executor.errors import EngineBusy as EngineBusy
    from qllm.executor.errors import EngineClosed as EngineClosed
    from qllm.executor.errors import ExecutorError as ExecutorError
    from qllm.executor.errors import KVMemoryError as KVMemoryError
    from qllm.executor.errors import LoadError as LoadError
    from qllm.executor.errors import RequestError as RequestError
    from qllm.executor.errors import RequestFailed as RequestFailed
    from qllm.executor.errors import SamplingError as SamplingError
    from qllm.executor.errors import UnsupportedModelError as UnsupportedModelError
    from qllm.executor.model.loading import load_model as load_model
    from qllm.executor.model.loading import prepare_model as prepare_model
    from qllm.executor.model.split import LinearSplitter as LinearSplitter
    from qllm.executor.model.split import Split as Split
    from qllm.executor.sampling.grammar import Grammar as Grammar
    from qllm.executor.sampling.params import SamplingParams as SamplingParams

# GNU's OpenMP runtime reads it when PyTorch is imported. By default a waiting thread spins for some milliseconds, on
# the very core that the thread it waits for may need; after 2,000 turns, about a tenth of one, it sleeps instead.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Loaded when first used: torch and transformers take seconds to import.
_WHERE = {
    "Completion": "qllm.executor.engine.stream",
    "Engine": "qllm.executor.engine.engine",
    "EngineBusy": "qllm.executor.errors",
    "EngineClosed": "qllm.executor.errors",
    "ExecutorError": "qllm.executor.errors",
    "Grammar": "qllm.executor.sampling.grammar",
    "KVMemoryError": "qllm.executor.errors",
    "LinearSplitter": "qllm.executor.model.split",
    "LoadError": "qllm.executor.errors",
    "RealClock": "qllm.executor.engine.clock",
    "RequestError": "qllm.executor.errors",
    "RequestFailed": "qllm.executor.errors",
    "RequestTimes": "qllm.executor.engine.requests",
    "SamplingError": "qllm.executor.errors",
    "SamplingParams": "qllm.executor.sampling.params",
    "Split": "qllm.executor.model.split",
    "Stats": "qllm.executor.engine.engine",
    "Stream": "qllm.executor.engine.stream",
    "Token": "qllm.executor.engine.requests",
    "UnsupportedModelError": "qllm.executor.errors",
    "Usage": "qllm.executor.engine.stream",
    "VirtualClock": "qllm.executor.engine.clock",
    "load_model": "qllm.executor.model.loading",
    "prepare_model": "qllm.executor.model.loading",
    "replay": "qllm.executor.engine.replay",
}

__all__ = [*_WHERE]
__getattr__, __dir__ = lazy(__name__, _WHERE)
