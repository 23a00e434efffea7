"""Attention that is called for each sequence alone, and mixers of their own kind: the same tokens as `generate`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.model.info import model_facts
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Entry, Sequence
from qllm.executor.testing import tiny_model
from qllm.executor.unpacked.attention import hook_unpacked, part_of, unpacked
from qllm.executor.unpacked.caches import unpacked_layers
from tests.executor.kept_worlds import evicted, generated, in_chunks, prompts, stopped, world_of

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = ["full", "shared", "full", "shared"]
MODELS = {
    "deepseek_v32": {},
    "glm_moe_dsa": {"indexer_types": SHARED},
    "mistral_large4": {"indexer_types": SHARED},
    "inkling_text": {},
    "zaya": {},
    "minimax": {},
    "jamba": {},
}


FEW = ("deepseek_v32", "zaya", "jamba")  #: of each kind one; all are in test_families.py


@pytest.fixture(scope="module", params=[m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in MODELS])
def world(request, one_thread):
    """A model, and what transformers generates with it."""
    return world_of(tiny_model(request.param, **MODELS[request.param]), 5, 1, 21, 12, 30)


@torch.inference_mode()
def test_a_pass_stopped_at_any_point_gives_the_same_bits(world) -> None:
    model, asked, _ = world
    for logits, alone in stopped(model, asked, every=7):
        assert torch.equal(logits, alone)


@settings(max_examples=3, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_prompts_in_chunks_of_any_size_while_others_decode(world, sizes) -> None:
    model, asked, wanted = world
    assert in_chunks(model, asked[:5], sizes) == wanted[:5]


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_evicted_and_brought_back_under_load(world, evict) -> None:
    model, asked, wanted = world
    assert evicted(model, asked, evict, times=2) == wanted * 2


@pytest.mark.parametrize("model_type", ["deepseek_v32", "inkling_text"])
def test_hooks_are_put_on_once_and_rest_outside_of_passes(model_type) -> None:
    model, prompt = tiny_model(model_type), prompts(21)[0]
    wanted = generated(model, prompt)
    assert hook_unpacked(model) >= len(unpacked_layers(model.config)) > 0
    before = [module.forward for module, _ in unpacked(model)]
    assert len(before) == hook_unpacked(model)
    assert [module.forward for module, _ in unpacked(model)] == before
    assert generated(model, prompt) == wanted


def test_the_index_chooses_among_the_tokens_and_its_keys_count_in_the_memory_for_kv() -> None:
    prompt = prompts(30)[0]
    few, all_ = tiny_model("deepseek_v32"), tiny_model("deepseek_v32", index_topk=64)
    assert generated(few, prompt) != generated(all_, prompt)
    config = few.config
    of_layer = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim
    facts = model_facts(prepare_model(few))
    assert facts["kv_bytes_per_token"] == config.num_hidden_layers * of_layer * 4


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6))
def test_rows_follow_the_first_dimension_of_size_one(first, others, width) -> None:
    n = 6 - others if others < 6 else 1
    seq = Sequence([0] * 9, [0])
    entry, rows = Entry(seq, n, 0, others), others + n
    for shape in ((1, rows, width), (first + 1, 1, rows), (1, rows)):
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        part = part_of((whole, [whole]), 0, entry, rows)
        dim = 1 if shape[0] == 1 else 2
        assert torch.equal(part[0], whole.narrow(dim, others, n))
        assert torch.equal(part[1][0], part[0])
