"""Models and runners as a GPU sees them, on a CPU: kernels, and passes on tapes in place of CUDA graphs."""

from __future__ import annotations

from typing import Any
from unittest import mock

from transformers import PreTrainedModel

from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model import hooks, loading
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.testing import tiny_model
from tests.gpu.tape import TapeRecorder


def unpacked(model_type: str = "qwen3_moe", **overrides: Any) -> PreTrainedModel:
    """A tiny model prepared without the packed weights of CPUs, which kernels of a GPU cannot read."""
    with mock.patch.object(hooks, "pack_model", return_value=0):
        return loading.prepare_model(tiny_model(model_type, **overrides))


def replaying(model: PreTrainedModel, kv_blocks: int = 64, block_size: int = 4, **settings: Any) -> GraphRunner:
    """A runner that replays tapes; each bucket is recorded at its first use."""
    settings = {"graphs": "use", "max_seqs": 4, "kernels": True, "recorder": TapeRecorder} | settings
    runner = GraphRunner(model, kv_blocks, block_size, **settings)
    runner.make_cache()
    return runner


def sequences(*lengths: int, block_size: int = 4, room: int = 12) -> list[Sequence]:
    """Sequences of other tokens each, whose blocks lie among each other's; `room` tokens may be added to each."""
    blocks = -(-(max(lengths) + room) // block_size)
    return [
        Sequence([(7 * i + 5 * n) % 93 + 3 for i in range(length)], [*range(n, blocks * len(lengths), len(lengths))])
        for n, length in enumerate(lengths)
    ]
