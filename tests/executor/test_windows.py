"""Layers with a sliding window keep no more than a ring of blocks: the tokens of `generate`, and the same bits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor import Engine
from qllm.executor.calibration.grid import PassKind
from qllm.executor.calibration.profiler import Profiler
from qllm.executor.errors import KVMemoryError, PassError
from qllm.executor.model import info
from qllm.executor.model.info import blocks_in, model_facts, ring_size
from qllm.executor.model.kv_cache import PagedKVCache, Rings, slots_of
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end, window_of
from qllm.executor.testing import run_batch, tiny_model
from qllm.scheduler import Limits
from tests.engine_worlds import serve
from tests.executor.kept_worlds import (
    RING,
    evicted,
    in_chunks,
    prompts,
    runner_of,
    sequence,
    stopped,
    world_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("gpt_oss", "gemma4_text", "mimo_v2_flash")  #: sinks; other widths in some layers; windows in most layers
WINDOW = 8  #: of tiny models


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, one_thread):
    """A model, and what transformers generates with it."""
    return world_of(tiny_model(request.param), 5, 1, 21, 12, 30, 17)


@pytest.fixture(scope="module")
def gpt_oss(one_thread):
    return prepare_model(tiny_model("gpt_oss"))


# ---- tokens and bits ---------------------------------------------------------------------------------------------


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


@torch.inference_mode()
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=4))
def test_rings_have_the_bits_of_layers_that_keep_all_tokens(gpt_oss, sizes) -> None:
    found = []
    for rings in (None, Rings(8 * RING, RING, WINDOW)):
        runner = Runner(gpt_oss, 12 * 8, 4, rings=rings)
        for store in runner.cache.stores:
            store[:-1] = float("nan")
        some, rows = [sequence(p, i) for i, p in enumerate(prompts(5, 1, 21, 12, 30))], []
        for n in [*sizes, 30, 1, 1]:
            running = runner.begin((s, min(n, len(s.tokens) - s.computed)) for s in some)
            rows.append(run_to_end(running))
            for entry in running.sampled:
                entry.seq.tokens.append(int(rows[-1][running.sampled.index(entry)].argmax()))
        found.append(torch.cat(rows))
    assert torch.equal(*found)


@torch.inference_mode()
def test_a_sequence_whose_pass_was_given_up_starts_again(gpt_oss) -> None:
    """At any point, and nobody else notices."""
    asked = prompts(20, 18)
    want = run_batch(runner_of(gpt_oss), [sequence(p, i) for i, p in enumerate(asked)], 6)
    for at in range(0, 60, 7):
        runner = runner_of(gpt_oss)
        left, other = (sequence(p, i) for i, p in enumerate(asked))
        found = run_batch(runner, [other], 3)[0]
        run_to_end(runner.begin([(left, 5)]))
        running = runner.begin([(left, 15)])
        for _ in range(at + 1):
            running.advance()
        running.close()
        again = Sequence(list(asked[0]), left.blocks, ring=left.ring)
        first, more = run_batch(runner, [again, other], 3)
        assert (first, found + more) == (want[0][:3], want[1])


# ---- memory ------------------------------------------------------------------------------------------------------


def test_a_long_sequence_keeps_no_more_than_its_ring(gpt_oss) -> None:
    most: list[tuple[int, int]] = []

    def look(loop, *_) -> None:
        most.extend((len(s.blocks), len(s.ring)) for s in loop.sequences.values())

    limits = Limits(max_seqs=2, max_batched_tokens=32, kv_blocks=60, block_size=4)
    with Engine(gpt_oss, limits=limits) as engine:
        cache = engine._runner.cache
        rings = cache.rings
        assert rings == Rings(2 * 2 * 2, 2, WINDOW)  # twice max_seqs sequences, each two blocks
        assert {len(store) for i in cache.ringed for store in (cache.keys[i], cache.values[i])} == {8 * 4 + 1}
        assert cache.ringed == {0, 2}
    (served,) = serve_windows(gpt_oss, [(prompts(150)[0], 60, 0, 0.0)], limits, look)
    assert len(served.tokens) == 210
    assert max(most) == (-(-209 // 4), 2)


def serve_windows(model, requests, limits, hook=lambda *_: None):
    return serve(model, requests, limits=limits, hook=hook)


def test_full_layers_and_windows_are_counted_apart(gpt_oss) -> None:
    facts = model_facts(gpt_oss)
    of_layer = 2 * 2 * 16 * 4  # K and V, heads, width, float32
    assert (facts["kv_bytes_per_token"], facts["window_bytes_per_token"]) == (2 * of_layer, 2 * of_layer)
    assert (facts["window"], facts["layers"]) == (WINDOW, 4)


@pytest.mark.parametrize(
    ("model_type", "settings_"),
    [
        ("qwen3_moe", {}),
        ("mixtral", {"sliding_window": 6}),  # all layers
        ("kolibri1", {}),  # the same
        ("deepseek_v3", {}),
        ("qwen3_next", {}),
    ],
)
def test_other_models_stay_as_they_are(model_type, settings_) -> None:
    model = prepare_model(tiny_model(model_type, **settings_))
    assert window_of(model) is None
    facts = model_facts(model)
    assert (facts["window"], facts["window_bytes_per_token"]) == (0, 0)
    with Engine(model, limits=Limits(kv_blocks=20)) as engine:
        assert engine._runner.cache.rings is None
        assert engine.limits.max_resident == (64 if facts["state_bytes"] else None)


@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(1, 20), st.integers(1, 50), st.integers(0, 999),
    st.integers(1, 1_000_000),
)  # fmt: skip
def test_blocks_are_as_many_as_fit_beside_the_rings(token, in_ring, size, rings, states, memory) -> None:
    def takes(blocks: int) -> int:
        slots = blocks * size + 1, min(blocks, rings) * size + 1
        return states + slots[0] * token + slots[1] * in_ring

    sizes = {"states": states, "ring_token_bytes": in_ring, "ring_blocks": rings}
    model = SimpleNamespace(device=torch.device("cpu"))
    if takes(1) > memory:
        with pytest.raises(
            KVMemoryError, match=f"kv_memory is {memory} bytes; allowed: at least {takes(1)}, one block"
        ):
            blocks_in(model, token, size, memory, **sizes)
        return
    blocks = blocks_in(model, token, size, memory, **sizes)
    assert takes(blocks) <= memory < takes(blocks + 1)


def test_windows_that_do_not_fit_are_refused_at_the_start(gpt_oss, monkeypatch) -> None:
    facts = model_facts(gpt_oss)
    monkeypatch.setattr("qllm.executor.engine.engine.model_facts", lambda _: facts)
    need = (40 * 16 + 1) * facts["kv_bytes_per_token"]
    windows = (40 * 16 + 1) * facts["window_bytes_per_token"]
    monkeypatch.setattr(info, "memory_bytes", lambda _: (10**9, need + windows - 1))
    with pytest.raises(KVMemoryError, match=rf"kv_blocks is 40: {need} bytes of KV and {windows} of sliding windows"):
        Engine(gpt_oss, limits=Limits(kv_blocks=40))
    with pytest.raises(KVMemoryError, match=f"kv_memory is 5 bytes; allowed: at least {17 * 1024}, one block of 16"):
        Engine(gpt_oss, kv_memory=5)


def test_a_sequence_without_a_ring_is_refused(gpt_oss) -> None:
    runner = runner_of(gpt_oss)
    for ring, says in (([0], "need 2 KV blocks, the sequence has 1"), ([0, 16], r"not all within 0\.\.15, where win")):
        with pytest.raises(PassError, match=says):
            runner.begin([(Sequence([5] * 9, [0, 1, 2], ring=ring), 9)])
    runner.begin([(Sequence([5] * 4, [0], ring=[3]), 4)])
    with pytest.raises(ValueError, match="rings of 1 blocks must hold the window, 8 tokens"):
        PagedKVCache(9, 4, rings=Rings(9, 1, WINDOW))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 60), st.integers(1, 60))
def test_positions_lie_in_the_ring_and_come_round(size, block_size, start, n) -> None:
    ring = [7 * i + 3 for i in range(size)][::-1]
    cache = PagedKVCache(100, block_size, rings=Rings(100, size, size * block_size))
    found = cache.slots([], ring, start, start + n, 1)
    want = [ring[p // block_size % size] * block_size + p % block_size for p in range(start, start + n)]
    assert found.tolist() == want
    blocks = [*range(99)]
    for window in (None, size * block_size + 1):
        slots = cache.slots(blocks, ring, start, start + n, window)
        assert np.array_equal(slots, slots_of(blocks, block_size, start, start + n))


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [3, 30])
def test_of_windows_what_the_next_token_sees_goes_to_host_memory(gpt_oss, tokens) -> None:
    facts, runner = model_facts(gpt_oss), runner_of(gpt_oss)
    (prompt,) = prompts(tokens)
    want = run_batch(runner, [sequence(prompt, 0)], 4)
    here = sequence(prompt, 1)
    first = run_batch(runner, [here], 2)
    host = runner.cache.offload(here.blocks, here.computed, here.ring)
    kept = min(WINDOW - 1, tokens + 1)
    assert host.nbytes == (tokens + 1) * facts["kv_bytes_per_token"] + kept * facts["window_bytes_per_token"]
    for store in runner.cache.stores:
        store[:-1] = float("nan")
    there = sequence(prompt, 4)
    here.blocks, here.ring = there.blocks, there.ring
    runner.cache.restore(host, here.blocks, here.ring)
    assert [first[0] + run_batch(runner, [here], 2)[0]] == want


@torch.inference_mode()
def test_a_calibration_measures_with_rings(gpt_oss) -> None:
    profiler = Profiler(gpt_oss, 200, 3)
    cache = profiler.runner.cache
    assert cache.rings == Rings(4 * ring_size(WINDOW, 16, kernels=False), 1, WINDOW)
    for store in cache.stores:
        assert (store[:-1] != 0).all()
        assert (store[-1] == 0).all()
    with profiler.timed() as watch:
        for kind in (PassKind(3, 1, 40), PassKind(1, 30, 20)):
            assert profiler.sample(kind, watch).seconds > 0
    assert profiler.switch_seconds() >= 0
    assert profiler.bandwidth() > 0


@pytest.mark.parametrize("evict", ["recompute", "offload"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next"])
def test_no_more_sequences_hold_memory_than_there_is_room_for(model_type, evict) -> None:
    """With many levels and few places, while passes are suspended."""
    model = prepare_model(tiny_model(model_type))
    held = []

    def look(loop, *_) -> None:
        kept = [s for s in loop.sequences.values() if s.ring or (s.recurrent is not None and s.host is None)]
        held.append((len(kept), loop.scheduler.memory.resident))

    lengths = np.random.default_rng(3).integers(3, 30, 14)
    asked = [
        (p, 8, 2 - i % 5, 0.004 * i) for i, p in enumerate(prompts(*lengths))
    ]  # each more urgent than those before
    limits = Limits(max_seqs=1, max_batched_tokens=16, kv_blocks=40, block_size=4, evict=evict)
    served = serve_windows(model, asked, limits, look)
    assert [len(s.tokens) - len(p) for s, (p, *_) in zip(served, asked, strict=True)] == [8] * 14
    assert sum(s.request.evictions for s in served) > 0
    assert max(resident for _, resident in held) == 2
    assert max(kept for kept, _ in held) == 2
    alone = serve_windows(model, asked[:1], limits)
    assert alone[0].tokens == served[0].tokens
