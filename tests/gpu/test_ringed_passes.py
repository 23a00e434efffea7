"""Layers that keep a window alone, by a GPU's kernels: tokens and bits are those of layers that keep all tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qllm.executor.engine.engine as engine_module
from qllm.executor.engine.engine import Engine
from qllm.executor.gpu import packed_attention
from qllm.executor.gpu.pass_inputs import RECORDED_ROWS
from qllm.executor.graphs.buckets import Bucket
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model import info
from qllm.executor.model.kv_cache import Rings
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import Split, whole
from qllm.executor.testing import run_batch
from qllm.scheduler import Limits
from tests.gpu.plain import plain_kernels
from tests.gpu.tape import TapeRecorder
from tests.gpu.worlds import replaying, unpacked

pytestmark = pytest.mark.usefixtures("one_thread")
assert plain_kernels  # a fixture of this module
WINDOW = 8  #: of tiny models
LONGEST = 60  #: tokens of a sequence
by_plain_loops = pytest.mark.usefixtures("plain_kernels")


@pytest.fixture(scope="module", params=["gpt_oss", "gemma4_text"])
def model(request):
    return unpacked(request.param)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def rings(size: int) -> Rings:
    return Rings(6 * size, size, WINDOW)


def texts(*lengths: int) -> list[list[int]]:
    return [[(7 * i + 5 * n) % 93 + 3 for i in range(length)] for n, length in enumerate(lengths)]


def sequences(runner: Runner, *lengths: int) -> list[Sequence]:
    """Sequences whose blocks lie among each other's; nothing that was ever in the cache is a number."""
    for store in runner.cache.stores:
        store[:-1] = float("nan")
    n = len(lengths)
    blocks = -(-max(LONGEST, *lengths) // 4)
    return [
        Sequence(text, [*range(i, blocks * n, n)], ring=runner.cache.ring_of(4 * blocks, i)[::-1])
        for i, text in enumerate(texts(*lengths))
    ]


def chunked(runner: Runner, sizes: list[int]) -> torch.Tensor:
    """Logits of all tokens drawn for four prompts, in chunks of these sizes while others decode."""
    found = []
    some = sequences(runner, 30, 5, 21, 12)
    for n in [*sizes, LONGEST, 1, 1]:
        running = runner.begin((s, min(n, len(s.tokens) - s.computed)) for s in some)
        run_to_end(running)
        for entry, row in zip(running.sampled, running.logits, strict=True):
            entry.seq.tokens.append(int(row.argmax()))
            found.append((some.index(entry.seq), len(entry.seq.tokens), row))
    return torch.stack([row for *_, row in sorted(found, key=lambda f: f[:2])])


def runner_of(model, size: int | None, split=whole, blocks: int = 64) -> Runner:
    runner = Runner(model, blocks, 4, split, kernels=True, rings=None if size is None else rings(size))
    runner.make_cache()
    return runner


@by_plain_loops
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=4), st.sampled_from([2, 3, 5]), st.integers(1, 4))
def test_chunks_of_any_size_give_the_bits_of_layers_that_keep_all(model, sizes, size, groups) -> None:
    def split(batch):
        return Split(3, groups)

    want = chunked(runner_of(model, None, split), sizes)
    assert torch.equal(chunked(runner_of(model, size, split), sizes), want)


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma4_text"])
def test_the_kernels_themselves_read_nothing_but_the_window(model_type) -> None:
    """Interpreted, far from a sequence's start: rings come round; a chunk is laid side by side, or fits its ring."""
    model = unpacked(model_type, num_hidden_layers=2)
    found = [far_from_the_start(runner_of(model, size, blocks=200)) for size in (None, 2, 5)]
    assert not found[0].isnan().any()
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def far_from_the_start(runner: Runner) -> torch.Tensor:
    """Logits of a chunk of ten tokens after 131, beside a sequence that decodes after 150, over the same random KV."""
    some = sequences(runner, 141, 151)
    for seq, computed in zip(some, (131, 150), strict=True):
        seq.computed = computed
        for layer, stores in enumerate(zip(runner.cache.keys, runner.cache.values, strict=True)):
            window = WINDOW if layer in runner.cache.ringed else None
            first = 0 if window is None else computed - WINDOW + 1
            slots = runner.cache.slots(seq.blocks, seq.ring, first, computed, window)
            for number, store in enumerate(stores):
                random = torch.Generator().manual_seed(1000 * layer + 10 * computed + number)
                store[slots] = torch.randn(computed, *store.shape[1:], generator=random)[first:]
    return run_to_end(runner.begin([(some[0], 10), (some[1], 1)]))


@by_plain_loops
@pytest.mark.parametrize("groups", [1, 3])
def test_long_chunks_within_a_window_are_attended_in_large_blocks(model, monkeypatch, groups) -> None:
    monkeypatch.setattr(packed_attention, "suits", lambda q, k, v: True)
    monkeypatch.setattr(packed_attention, "LARGE_ROWS", 3)
    split = lambda batch: Split(99, groups)  # noqa: E731
    want = chunked(runner_of(model, None, split), [3, 4, 9])
    for size in (2, 4):
        assert torch.equal(chunked(runner_of(model, size, split), [3, 4, 9]), want)


@by_plain_loops
def test_replayed_passes_have_the_bits_of_layers_that_keep_all(model) -> None:
    want = chunked(replaying(model, 64), [3, 14])
    runner = replaying(model, 64, rings=rings(10))
    for _ in range(2):
        assert torch.equal(chunked(runner, [3, 14]), want)
    assert {*runner.recorded} == {Bucket(0, 32), Bucket(0, 64), Bucket(4, 32), Bucket(4, 0)}


@by_plain_loops
def test_a_chunk_that_writes_over_what_it_sees_is_not_replayed(model) -> None:
    runner = replaying(model, 64, rings=rings(2))
    torch.testing.assert_close(chunked(runner, [3, 14]), chunked(replaying(model, 64), [3, 14]), atol=1e-4, rtol=1e-4)
    assert {*runner.recorded} == {Bucket(4, 0)}


@by_plain_loops
def test_a_pass_that_no_copy_is_free_for_has_the_same_bits(model) -> None:
    runner = replaying(model, 64, rings=rings(10))
    want = chunked(runner, [9])
    for some in runner.recorded.values():
        some[0].free = False
    assert torch.equal(chunked(runner, [9]), want)


@by_plain_loops
def test_a_suspended_pass_counts_the_context_that_it_has_gathered(model) -> None:
    held = {}
    for size in (2, 10):  # a chunk of 20 is laid side by side, or written first
        runner = runner_of(model, size, lambda batch: Split(99, 2))
        (one,) = sequences(runner, 40)
        run_to_end(runner.begin([(one, 20)]))
        running = runner.begin([(one, 20)])
        while (point := running.advance()) is not None and point != (0, "attention", 1):
            pass
        held[size] = running.held_bytes()
        running.close()
        of_token = runner.cache.keys[0][0].nbytes + runner.cache.values[0][0].nbytes
    assert 0 in runner.cache.ringed
    assert held[2] - held[10] == (WINDOW - 1) * of_token + (20 + 20) * of_token


@by_plain_loops
@pytest.mark.parametrize("evict", ["recompute", "offload"])
@pytest.mark.parametrize("rows", [1, 64])
def test_an_engine_evicts_and_brings_back(model, monkeypatch, evict, rows) -> None:
    size = -(-(WINDOW + rows - 1) // 4)
    monkeypatch.setattr("qllm.executor.engine.block_manager.ring_size", lambda *_, **__: size)
    monkeypatch.setattr(info, "ring_size", lambda *_, **__: size)
    made: list[GraphRunner] = []

    def make(*args, **more):
        made.append(GraphRunner(*args, **more | {"graphs": "use"}, kernels=True, recorder=TapeRecorder))
        return made[-1]

    monkeypatch.setattr(engine_module, "GraphRunner", make)
    limits = Limits(max_seqs=4, max_batched_tokens=24, kv_blocks=16, block_size=4, evict=evict)
    asked = texts(5, 1, 21, 12, 30, 17) * 2
    want = [run_batch(Runner(model, 64, 4), [Sequence(list(text), [*range(24)])], 6)[0] for text in asked]
    with Engine(model, policy="qllm", limits=limits) as engine:
        streams = [engine.submit(text, max_new_tokens=6, priority=i % 2, stop=()) for i, text in enumerate(asked)]
        assert [stream.result().tokens for stream in streams] == want
        assert sum(stream.times.evictions for stream in streams) > 0
        assert engine.call(lambda loop: loop.memory.held) == 0
    assert made[0].recorded


def test_rings_on_a_gpu_hold_the_rows_of_a_recorded_pass_beside_the_window() -> None:
    assert info.ring_size(128, 16, kernels=False) == 8
    assert info.ring_size(128, 16, kernels=True) == -(-(128 + RECORDED_ROWS - 1) // 16)
    assert info.ring_size(0, 16, kernels=True) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_rings_change_no_bits(model) -> None:
    model = model.to("cuda").to(torch.bfloat16)
    want = chunked(runner_of(model, None), [3, 14])
    for size in (2, 10):
        assert torch.equal(chunked(runner_of(model, size), [3, 14]), want)
