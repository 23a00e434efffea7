"""A pass that is suspended, closed or broken: its bits, its neighbours, its cache."""

import ctypes
import os
import sys

import pytest
import torch

from qllm.executor.errors import PassError
from qllm.executor.model.kv_cache import PagedKVCache
from qllm.executor.model.loading import prepare_model
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.passes import Point
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.model.split import LinearSplitter, Split, whole
from qllm.executor.testing import tiny_model
from tests.engine_worlds import finest


@pytest.fixture(scope="module")
def model():
    return prepare_model(tiny_model("qwen3_moe"))


@pytest.fixture(autouse=True)
def _inference(one_thread):
    with torch.inference_mode():
        yield


def tokens(n, seed):
    return torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def scene(model):
    """A runner with three sequences: `a` decodes, `b` has half its prompt computed, `c` is a newcomer."""
    split = Split(experts_per_group=3, query_blocks=2)
    runner = Runner(model, kv_blocks=24, block_size=4, splitter=lambda batch: split)
    a = Sequence(tokens(6, 1), [0, 3, 6])
    b = Sequence(tokens(20, 2), [1, 4, 7, 10, 13])
    c = Sequence(tokens(9, 3), [2, 5, 8])
    a.tokens.append(run_to_end(runner.begin([(a, 6)])).argmax().item())
    run_to_end(runner.begin([(b, 10)]))
    return runner, a, b, c


def be_pass(runner, a, b):
    return runner.begin([(a, 1), (b, 10)])


def points_of(running):
    points = []
    while (point := running.advance()) is not None:
        points.append(point)
    return points


def test_points_lie_before_attention_between_query_blocks_and_between_expert_groups(model):
    runner, a, b, _ = scene(model)
    points = points_of(be_pass(runner, a, b))
    assert points[0] == Point(0, "attention", 0)
    for layer in range(4):
        groups = {
            stage: [p.number for p in points if p.layer == layer and p.stage == stage]
            for stage in ("attention", "experts")
        }
        assert groups["attention"] == [0, 1]
        assert groups["experts"] == list(range(len(groups["experts"])))
        assert 2 <= len(groups["experts"]) <= 3  # at most 8 experts, 3 a group
    assert points == sorted(points, key=lambda p: (p.layer, p.stage, p.number))


def test_a_suspended_pass_gives_the_same_bits_wherever_it_was_suspended(model):
    runner, a, b, c = scene(model)
    alone = be_pass(runner, a, b)
    n_points = len(points_of(alone))
    expected_c = run_to_end(runner.begin([(c, 9)]))
    kv = [t.clone() for t in (*runner.cache.keys, *runner.cache.values)]
    for stop in range(1, n_points + 1):
        runner, a, b, c = scene(model)
        running = be_pass(runner, a, b)
        for _ in range(stop):
            running.advance()
        assert torch.equal(run_to_end(runner.begin([(c, 9)])), expected_c)
        assert torch.equal(run_to_end(running), alone.logits), stop
        assert all(map(torch.equal, kv, (*runner.cache.keys, *runner.cache.values))), stop


def test_many_passes_resume_in_any_order(model):
    runner, a, b, c = scene(model)
    expected = [run_to_end(runner.begin([(s, n)])) for s, n in ((a, 1), (b, 10), (c, 9))]
    runner, a, b, c = scene(model)
    passes = [runner.begin([(s, n)]) for s, n in ((a, 1), (b, 10), (c, 9))]
    turn = 0
    while not all(p.done for p in passes):
        turn = (turn * 5 + 3) % 7
        if not passes[turn % 3].done:
            passes[turn % 3].advance()
        elif (left := next((p for p in passes if not p.done), None)) is not None:
            left.advance()
    assert all(torch.equal(p.logits, e) for p, e in zip(passes, expected, strict=True))


def test_points_change_no_bits_of_a_decode_pass(model):
    results = []
    for splitter in (finest, whole):
        runner, a, _, _ = scene(model)
        runner.splitter = splitter
        results.append(run_to_end(runner.begin([(a, 1)])))
    assert torch.equal(*results)


def test_an_exception_ends_its_own_pass_and_no_other(model):
    runner, a, b, c = scene(model)
    expected = run_to_end(runner.begin([(c, 9)]))
    n_points = len(points_of(be_pass(runner, a, b)))
    for stop in range(1, n_points + 1):
        runner, a, b, c = scene(model)
        other = runner.begin([(c, 9)])
        other.advance()
        broken = be_pass(runner, a, b)
        for _ in range(stop):
            broken.advance()
        with pytest.raises(ZeroDivisionError):
            broken.fail(ZeroDivisionError())
        assert broken.done
        assert (a.computed, b.computed) == (6, 10)
        assert torch.equal(run_to_end(other), expected)


def test_closed_anywhere_the_pass_can_be_run_again_with_the_same_bits(model):
    runner, a, b, _ = scene(model)
    expected = run_to_end(be_pass(runner, a, b))
    for stop in (0, 1, 7, 13):
        runner, a, b, _ = scene(model)
        running = be_pass(runner, a, b)
        for _ in range(stop):
            running.advance()
        running.close()
        running.close()
        assert running.done
        assert (a.computed, b.computed) == (6, 10)
        assert torch.equal(run_to_end(be_pass(runner, a, b)), expected)


def test_offloaded_and_restored_elsewhere_gives_the_same_bits(model):
    runner, a, b, _ = scene(model)
    expected = run_to_end(be_pass(runner, a, b))
    runner, a, b, _ = scene(model)
    host = runner.cache.offload(b.blocks, b.computed)
    run_to_end(runner.begin([(Sequence(tokens(20, 9), list(b.blocks)), 20)]))  # someone else takes the blocks
    b.blocks = [23, 21, 19, 17, 15]
    runner.cache.restore(host, b.blocks)
    assert torch.equal(run_to_end(be_pass(runner, a, b)), expected)


def test_another_sequences_nan_does_not_reach_a_neighbour_through_padding(model):
    runner, a, b, _ = scene(model)
    expected = run_to_end(be_pass(runner, a, b))
    runner, a, b, _ = scene(model)
    used = torch.zeros(runner.cache.zero_slot + 1, dtype=torch.bool)
    used[runner.cache.zero_slot] = True
    for s in (a, b):
        for block in s.blocks:
            used[4 * block : 4 * block + 4] = True
    for t in (*runner.cache.keys, *runner.cache.values):
        t[~used] = float("nan")
    assert torch.equal(run_to_end(be_pass(runner, a, b)), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is of Linux")
def test_the_memory_of_a_cache_is_there_before_its_blocks_are_used():
    """Else a prefill pays for the first use of each page, and LS requests with it."""

    def resident(tensor: torch.Tensor) -> float:
        """Share of its whole pages that are in memory, by mincore(2)."""
        page = os.sysconf("SC_PAGE_SIZE")
        first, end = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
        there = (ctypes.c_ubyte * (end - first))()
        length = ctypes.c_size_t((end - first) * page)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first * page), length, there) == 0
        return sum(byte & 1 for byte in there) / len(there)

    cache, like = PagedKVCache(n_blocks=2048, block_size=16), torch.zeros(1, 4, 64)
    keys, values = cache.layer(0, like, like)
    assert resident(keys) > 0.9
    assert resident(values) > 0.9
    assert not keys.any()


@pytest.mark.parametrize(
    ("sequence", "n", "message"),
    [
        (Sequence([5, 6], [0]), 3, "3 tokens of a sequence with 0 of 2"),
        (Sequence([5] * 9, [0, 1]), 9, "9 tokens need 3 KV blocks"),
        (Sequence([5], [24]), 1, "0..23"),
        (Sequence([5] * 300, list(range(24)) * 4), 300, "beyond the model's last, 255"),
    ],
)
def test_a_pass_that_does_not_fit_is_refused(model, sequence, n, message):
    runner = Runner(model, kv_blocks=24, block_size=4)
    with pytest.raises(PassError, match=message):
        runner.begin([(sequence, n)])


def test_steps_are_split_below_the_longest_step(model):
    costs = LinearSplitter(n_experts=8, top_k=2, max_step=1.0, expert=0.1, row=0.01, cell=0.01)
    runner = Runner(model, kv_blocks=24, block_size=4, splitter=costs)
    short, long = (runner.begin([(Sequence(tokens(n, 1), list(range(24))), n)]) for n in (2, 64))
    assert short.split == Split(experts_per_group=8, query_blocks=1, merge_rows=10)
    assert long.split.experts_per_group == 2  # 16 rows on average, 28 at three standard deviations: 0.38 s each
    assert long.split.query_blocks == 21  # 64 * 65 / 2 cells at 0.01 s
    groups = long.plan(None).block_groups
    assert [number for number, _ in groups] == list(range(21))
    rows = [row for _, blocks in groups for block in blocks for row in range(block.first, block.last)]
    assert rows == list(range(64))
    assert max(sum(b.last - b.first for b in blocks) * max(b.high for b in blocks) for _, blocks in groups) < 200
