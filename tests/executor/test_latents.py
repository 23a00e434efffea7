"""Latent attention keeps latents: the same tokens as `generate`, the bits of a pass that is not stopped, a small KV."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu import packed_attention
from qllm.executor.latent.form import find_form
from qllm.executor.latent.hook import METHOD, forms, hook_latents
from qllm.executor.model.info import model_facts
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split
from qllm.executor.testing import tiny_model
from tests.executor.kept_worlds import evicted, in_chunks, stopped, world_of
from tests.gpu.plain import plain_kernels
from tests.gpu.worlds import sequences
from tests.gpu.worlds import unpacked as as_on_a_gpu

pytestmark = pytest.mark.usefixtures("one_thread")
assert plain_kernels  # a fixture of this module
WIDTHS = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}


@pytest.fixture(scope="module")
def world(one_thread):
    """A model whose latents, keys and values all have widths of their own, and what transformers generates with it."""
    return world_of(tiny_model("deepseek_v3", **WIDTHS), 5, 1, 21, 12, 30)


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


def test_a_token_takes_a_latent_and_a_rotary_part_in_each_layer(world) -> None:
    facts = model_facts(world[0])
    assert facts["kv_bytes_per_token"] == facts["layers"] * (24 + 8) * 4


def test_hooked_twice_it_is_hooked_once_and_outside_of_a_pass_nothing_changes(world) -> None:
    model = world[0]
    hooks = [getattr(m, METHOD) for m in model.modules() if hasattr(m, METHOD)]
    assert hook_latents(model) == len(hooks) == len(list(forms(model)))
    assert [getattr(m, METHOD) for m in model.modules() if hasattr(m, METHOD)] == hooks
    keys, values = hooks[0](torch.ones(1, 1, 3, 24), torch.ones(1, 1, 3, 8))
    assert keys.shape == (1, 4, 3, 20)
    assert values.shape == (1, 4, 3, 20)


def test_attention_that_is_called_for_one_sequence_at_a_time_is_left_alone() -> None:
    assert hook_latents(tiny_model("deepseek_v32")) == 0


class Expanding:
    """What a layer makes of latents: keys `[own, shared]` or the other way round, and values."""

    def __init__(self, heads, own, value, width, seed, *, shared_first=False, bias=0.0, squared=False):
        random = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(heads, width, own, generator=random)
        self.values = torch.randn(heads, width, value, generator=random)
        self.shared_first, self.bias, self.squared = shared_first, bias, squared

    def __call__(self, latent, rotary):
        latent = latent[0] * latent[0].abs() if self.squared else latent[0]
        own, shared = latent @ self.keys, rotary[0].expand(len(self.keys), -1, -1)
        keys = torch.cat((shared, own) if self.shared_first else (own, shared), -1)
        return keys[None], (latent @ self.values + self.bias)[None]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_queries_meet_latents_as_they_meet_keys(heads, own, value, width, rotary, shared_first, seed) -> None:
    expand = Expanding(heads, own, value, width, seed, shared_first=shared_first)
    form = find_form(expand, torch.empty(1, 1, 2, width), torch.empty(1, 1, 2, rotary))
    assert form is not None
    random = torch.Generator().manual_seed(seed)
    c, r = (torch.randn(1, 1, 7, n, generator=random) for n in (width, rotary))
    q = torch.randn(3, heads, own + rotary, generator=random)
    keys, values = (found[0] for found in expand(c, r))
    logits = form.queries(q).transpose(0, 1) @ torch.cat((c, r), -1)[0].mT
    torch.testing.assert_close(logits, q.transpose(0, 1) @ keys.mT, atol=1e-4, rtol=1e-4)
    sums = torch.rand(3, heads, 7, generator=random)
    wanted = (sums.transpose(0, 1) @ values).transpose(0, 1)
    torch.testing.assert_close(form.results((sums @ c[0, 0]).contiguous()), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("oddity", [{"bias": 1.0}, {"squared": True}])
def test_keys_made_in_another_way_have_no_form(oddity) -> None:
    expand = Expanding(2, 4, 4, 6, 0, **oddity)
    assert find_form(expand, torch.empty(1, 1, 2, 6), torch.empty(1, 1, 2, 3)) is None


def test_a_model_of_an_unknown_form_is_served_with_the_keys_of_all_heads(monkeypatch, caplog, world) -> None:
    monkeypatch.setattr("qllm.executor.latent.hook.find_form", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        model = prepare_model(tiny_model("deepseek_v3", **WIDTHS))
    assert "keys and values of all heads are kept" in caplog.text
    assert list(forms(model)) == []
    assert model_facts(model)["kv_bytes_per_token"] == model_facts(model)["layers"] * 4 * (20 + 20) * 4
    assert in_chunks(model, world[1], [7]) == world[2]


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 3])
def test_on_a_gpu_prompts_are_expanded_for_tiles_and_for_large_blocks(plain_kernels, monkeypatch, groups) -> None:
    model = as_on_a_gpu("deepseek_v3", **WIDTHS)
    found = []
    for rows, kernels in ((9, True), (1000, True), (0, False)):
        monkeypatch.setattr(packed_attention, "LARGE_ROWS", rows)
        monkeypatch.setattr(packed_attention, "suits", lambda q, k, v: True)
        runner = Runner(model, 200, 4, kernels=kernels)
        some = sequences(60, 21, 8, 5)
        run_to_end(runner.begin([(some[0], 25), (some[1], 21), (some[2], 8), (some[3], 5)], Split(99, groups)))
        some[1].tokens += [9] * 30
        some[3].tokens.append(7)
        found.append(run_to_end(runner.begin([(some[0], 35), (some[1], 30), (some[3], 1)], Split(99, groups))))
    for logits in found[:2]:
        torch.testing.assert_close(logits, found[2], atol=1e-4, rtol=1e-4)
