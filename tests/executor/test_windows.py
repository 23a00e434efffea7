"""Layers with a sliding window keep no more than a ring of blocks: the tokens of `generate`, and the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor import Engine
from qllm.executor.errors import KVMemoryError, PassError
from qllm.executor.model.info import blocks_in, model_facts
from qllm.executor.model.kv_cache import PagedKVCache, Rings, slots_of
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end, window_of
from qllm.executor.model.split import Split
from qllm.executor.testing import run_batch, tiny_model
from qllm.scheduler import Limits
from tests.engine_worlds import finest
from tests.executor.kept_worlds import (
    NEW,
    RING,
    evicted,
    generated,
    in_chunks,
    mixed_pass,
    prompts,
    runner_of,
    sequences,
    stopped,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("gpt_oss", "gemma4_text", "mimo_v2_flash")  #: sinks; other widths in some layers; windows in most layers


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, one_thread):
    """A model, and what transformers generates with it."""
    model = tiny_model(request.param)
    asked = prompts(5, 1, 21, 12, 30, 17)
    wanted = [generated(model, p) for p in asked]
    return prepare_model(model), asked, wanted


@torch.inference_mode()
def test_a_pass_stopped_at_any_point_gives_the_same_bits(world) -> None:
    model, asked, _ = world
    assert runner_of(model).cache.rings is not None
    for logits, alone in stopped(model, asked, every=5):
        assert torch.equal(logits, alone)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_prompts_in_chunks_of_any_size_while_others_decode(world, sizes) -> None:
    model, asked, wanted = world
    assert in_chunks(model, asked[:5], sizes) == wanted[:5]


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_evicted_and_brought_back_under_load(world, evict) -> None:
    model, asked, wanted = world
    assert evicted(model, asked, evict, times=3) == wanted * 3
