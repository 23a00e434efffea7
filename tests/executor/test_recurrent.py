"""Layers with a state beside the KV: what is kept of each sequence is its own, whatever happens to the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import LinearAttentionLayer

from qllm.executor import Engine
from qllm.executor.errors import KVMemoryError
from qllm.executor.model.info import blocks_in, model_facts
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import run_to_end
from qllm.executor.recurrent.mixers import hook_mixers, mixers
from qllm.executor.recurrent.states import recurrent_layers, spread, stacked, state_bytes, tensors
from qllm.executor.testing import run_batch, tiny_model
from qllm.scheduler import Limits
from tests.executor.kept_worlds import (
    NEW,
    evicted,
    generated,
    in_chunks,
    prompts,
    runner_of,
    sequences,
    stopped,
    world_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HYBRIDS = ("qwen3_next", "nemotron_h", "lfm2_moe")


@pytest.fixture(scope="module", params=HYBRIDS)
def world(request, one_thread):
    """A model, and what transformers generates with it."""
    return world_of(tiny_model(request.param), 5, 1, 21, 12, 30, 17)


@torch.inference_mode()
def test_a_pass_stopped_at_any_point_gives_the_same_bits(world) -> None:
    model, asked, _ = world
    for logits, alone in stopped(model, asked, every=1):
        assert torch.equal(logits, alone)


@torch.inference_mode()
def test_a_pass_given_up_at_any_point_changes_nobody_else(world) -> None:
    model, asked, wanted = world
    at = 0
    while True:
        runner = runner_of(model)
        left, kept = sequences([asked[2], asked[3]])
        run_batch(runner, [kept], 2)
        running = runner.begin([(left, len(left.tokens))])
        for _ in range(at + 1):
            if running.advance() is None:
                return
        running.close()
        again = Sequence(list(asked[2]), left.blocks)
        run_batch(runner, [kept, again], NEW - 2)
        assert kept.tokens[len(asked[3]) :] == wanted[3]
        assert again.tokens[len(asked[2]) :] == wanted[2][: NEW - 2]
        at += 3


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_prompts_in_chunks_of_any_size_while_others_decode(world, sizes) -> None:
    model, asked, wanted = world
    assert in_chunks(model, asked[:5], sizes) == wanted[:5]


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_evicted_and_brought_back_under_load(world, evict) -> None:
    model, asked, wanted = world
    assert evicted(model, asked, evict, times=3) == wanted * 3


def test_a_state_counts_in_the_memory_for_kv(world) -> None:
    model, asked, _ = world
    facts = model_facts(model)
    state, token = facts["state_bytes"], facts["kv_bytes_per_token"]
    assert state > 0
    sequence = Sequence(list(asked[0]), list(range(4)))
    with torch.inference_mode():
        run_to_end(runner_of(model).begin([(sequence, 5)]))
    assert state_bytes(sequence.recurrent) == state  # whatever the length
    memory = 8 * state + 33 * token
    assert blocks_in(model, token, 4, memory, states=8 * state) == 8
    with pytest.raises(KVMemoryError, match="recurrent state"):
        blocks_in(model, token, 4, 8 * state, states=8 * state)
    with pytest.raises(KVMemoryError, match="recurrent state"):
        Engine(model, limits=Limits(max_seqs=4), kv_memory=8 * state)


@pytest.mark.parametrize("family", HYBRIDS)
def test_hooks_are_put_on_once_and_rest_outside_of_passes(family) -> None:
    model, (prompt,) = tiny_model(family), prompts(9)
    wanted = generated(model, prompt)
    assert hook_mixers(model) == len(recurrent_layers(model.config)) > 0
    before = [module.forward for module, _ in mixers(model)]
    assert hook_mixers(model) == len(before)
    assert [module.forward for module, _ in mixers(model)] == before
    assert generated(model, prompt) == wanted


@given(st.integers(1, 5), st.integers(0, 3))
def test_stacked_rows_are_spread_to_where_they_came_from(n, seed) -> None:
    def layer(i: int) -> LinearAttentionLayer:
        made = LinearAttentionLayer()
        made.update_conv_state(torch.full((1, 3, 4), float(i)))
        made.update_recurrent_state(torch.full((1, 2, 5), float(10 * i + seed)))
        return made

    layers = [layer(i) for i in range(n)]
    kept = [own[key] for one in layers for own, key in tensors(one)]
    made = stacked(layers)
    for own, key in tensors(made):
        assert own[key].shape[0] == n
        own[key].add_(1.0)
    assert [float(own[key].mean()) for own, key in tensors(layers[-1])] == [n - 1.0, 10.0 * (n - 1) + seed]
    spread(made, layers)
    assert [float(own[key].mean()) for own, key in tensors(layers[-1])] == [float(n), 10.0 * (n - 1) + seed + 1]
    assert [own[key].data_ptr() for one in layers for own, key in tensors(one)] == [t.data_ptr() for t in kept]
