from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu import expert_rows
from qllm.executor.gpu.expert_rows import SortedRows, combine, sort_rows
from qllm.executor.model.expert_queues import ExpertQueues

NO_DEADLINE = settings(deadline=None, max_examples=25)


@st.composite
def routings(draw):
    """Top-k of a few tokens, with experts held elsewhere and padding rows; the number of experts; slots or none."""
    tokens, top_k, n_experts = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 8, 40]))
    expert = st.integers(-1, n_experts) | st.integers(0, min(1, n_experts - 1))  # many at one, many at none
    row = st.lists(expert, min_size=top_k, max_size=top_k)
    index = torch.tensor(draw(st.lists(row, min_size=tokens, max_size=tokens)))
    slots = draw(st.none() | st.lists(st.integers(-1, 5), min_size=tokens, max_size=tokens).map(torch.tensor))
    return index, n_experts, slots


def sorted_plainly(index, n_experts, slots):
    """What `sort_rows` should give, a loop over assignments."""
    (tokens, top_k), ids = index.shape, index.reshape(-1).tolist()
    padding = [False] * tokens if slots is None else (slots < 0).tolist()
    keys = [n_experts if padding[a // top_k] or not 0 <= e < n_experts else e for a, e in enumerate(ids)]
    order = sorted(range(len(ids)), key=keys.__getitem__)
    place = torch.tensor(order).argsort()
    offsets = torch.tensor([sum(key <= e for key in keys) for e in range(n_experts)], dtype=torch.int32)
    return SortedRows(torch.tensor(order) // top_k, place, offsets)


@NO_DEADLINE
@given(routings())
def test_rows_are_sorted_by_expert_and_what_no_expert_here_has_comes_last(routing):
    assert_sorted(*routing)


@NO_DEADLINE
@given(routings())
def test_many_rows_are_sorted_like_few(routing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_rows, "MAX_COUNTED", 0)
        assert_sorted(*routing)


def assert_sorted(index, n_experts, slots):
    got, expected = sort_rows(index, n_experts, slots), sorted_plainly(index, n_experts, slots)
    for name, a, b in zip(SortedRows._fields, got, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.tolist() == b.tolist(), name


def test_ranks_are_counted_over_several_chunks():
    index = torch.randint(0, 9, (300, 2), generator=torch.Generator().manual_seed(0))
    assert index.numel() > expert_rows._CHUNK
    assert_sorted(index, 8, None)


@NO_DEADLINE
@given(
    routings(),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([1, 7, 16, 40]),
)
def test_outputs_are_summed_in_the_order_of_a_tokens_experts(routing, dtype, weights_dtype, hidden):
    index, n_experts, slots = routing
    rows = sort_rows(index, n_experts, slots)
    numbers = torch.Generator().manual_seed(0)
    outputs = torch.randn(index.numel(), hidden, generator=numbers).to(dtype)
    outputs[rows.offsets[-1] :] = torch.nan  # as the memory of rows that no expert wrote may be
    weights = torch.rand(index.shape, generator=numbers).to(weights_dtype)
    held = (rows.place < rows.offsets[-1]).view(index.shape)
    weights[~held] = torch.inf
    expected = torch.zeros(len(index), hidden)
    for j in range(index.shape[1]):
        product = (outputs[rows.place.view(index.shape)[:, j]] * weights[:, j, None]).float()
        expected += torch.where(held[:, j, None], product, 0)
    got = combine(outputs, rows, weights, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected.to(dtype))


def test_the_sum_is_that_of_the_queues_of_the_cpu():
    numbers = torch.Generator().manual_seed(0)
    index, weights = torch.randint(0, 6, (9, 3), generator=numbers), torch.rand(9, 3, generator=numbers)
    hidden = torch.randn(9, 20, generator=numbers)
    queues = ExpertQueues(hidden, index, weights, 5)
    rows = sort_rows(index, 5)
    assert rows.offsets.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist() == queues.waiting
    outputs = hidden[rows.token] * 2
    end = int(rows.offsets[-1])
    queues.put(slice(0, end), outputs[:end].clone())
    assert torch.equal(combine(outputs, rows, weights, hidden.dtype), queues.result())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 32, 500, 1024, 3000])
def test_a_gpu_sorts_and_combines_like_a_cpu(tokens):
    numbers = torch.Generator().manual_seed(0)
    index, slots = torch.randint(0, 130, (tokens, 8), generator=numbers), torch.arange(tokens) - 2
    weights = torch.rand(tokens, 8, generator=numbers)
    expected = sorted_plainly(index, 128, slots)
    rows = sort_rows(index.cuda(), 128, slots.cuda())
    for a, b in zip(rows, expected, strict=True):
        assert torch.equal(a.cpu(), b)
    outputs = torch.randn(tokens * 8, 2048, generator=numbers).bfloat16()
    outputs[expected.offsets[-1] :] = torch.nan
    got = combine(outputs.cuda(), rows, weights.cuda(), torch.bfloat16).cpu()
    places = expected.place.view(tokens, 8)
    total = torch.zeros(tokens, 2048)
    for j in range(8):
        held = (places[:, j] < expected.offsets[-1])[:, None]
        total += torch.where(held, outputs[places[:, j]] * weights[:, j, None], 0)
    assert torch.equal(got, total.bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [32, 3000])
def test_a_recorded_graph_follows_a_new_routing(tokens):
    index, slots = torch.randint(0, 130, (tokens, 8), device="cuda"), torch.arange(tokens, device="cuda") - 2
    sort_rows(index, 128, slots)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = sort_rows(index, 128, slots)
    index.random_(0, 130)
    slots.neg_()
    graph.replay()
    for a, b in zip(rows, sorted_plainly(index.cpu(), 128, slots.cpu()), strict=True):
        assert torch.equal(a.cpu(), b)
