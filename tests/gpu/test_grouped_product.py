from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu.grouped_product import (
    _add_bias,
    fits_torch,
    grouped_product,
    takes_torch,
    tile_rows,
    triton_product,
)
from qllm.executor.gpu.launch import launch

NO_DEADLINE = settings(deadline=None, max_examples=15)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2}


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(counts):
    return torch.tensor(counts).cumsum(0).int()


def spans(offsets):
    bounds = [0, *offsets.tolist()]
    return list(pairwise(bounds))


def one_by_one(rows, weight, offsets, bias=None):
    """Each expert's product for itself, in float32; only the rows that experts have."""
    parts = [rows[a:b].float() @ weight[e].float() for e, (a, b) in enumerate(spans(offsets))]
    if bias is not None:
        parts = [part + bias[e].float() for e, part in enumerate(parts)]
    return torch.cat(parts)


@NO_DEADLINE
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=5),
    beyond=st.integers(0, 3),
    depth=st.sampled_from([1, 24, 64, 128, 130]),
    columns=st.sampled_from([1, 20, 64, 70]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    transposed=st.booleans(),
    with_bias=st.booleans(),
)
def test_each_row_goes_through_its_experts_weight(counts, beyond, depth, columns, dtype, transposed, with_bias):
    n_experts, offsets = len(counts), ends(counts)
    rows = tensor(sum(counts) + beyond, depth, dtype=dtype)
    rows[sum(counts) :] = torch.nan
    weight = tensor(n_experts, columns, depth, dtype=dtype).transpose(1, 2) if transposed else None
    weight = tensor(n_experts, depth, columns, dtype=dtype) if weight is None else weight
    bias = tensor(n_experts, columns, dtype=dtype, seed=1) if with_bias else None
    got = grouped_product(rows, weight, offsets, bias)
    assert got.shape == (len(rows), columns)
    error = got[: sum(counts)].float() - one_by_one(rows, weight, offsets, bias)
    assert (error.abs() <= TOLERANCE[dtype] * depth**0.5).all()


def test_rows_past_the_last_end_are_not_written(monkeypatch):
    def launch_on_sevens(kernel, grid, rows, weight, bias, offsets, out, *arguments, **constants):
        launch(kernel, grid, rows, weight, bias, offsets, out.fill_(7), *arguments, **constants)

    monkeypatch.setattr("qllm.executor.gpu.grouped_product.launch", launch_on_sevens)
    out = triton_product(tensor(40, 32), tensor(3, 32, 20), ends([4, 0, 6]))
    assert (out[10:] == 7).all()
    assert not (out[:10] == 7).any()


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_slice_of_experts_gives_the_bits_of_all(tile, dtype):
    counts = [3, 0, 40, 70, 1]
    rows, weight = tensor(sum(counts), 100, dtype=dtype), tensor(5, 90, 100, dtype=dtype).transpose(1, 2)
    whole = triton_product(rows, weight, ends(counts), tile=tile)
    for first, last in ((0, 2), (2, 3), (2, 5), (4, 5)):
        a, b = sum(counts[:first]), sum(counts[:last])
        part = triton_product(rows[a:b], weight[first:last], ends(counts[first:last]), tile=tile)
        assert torch.equal(part, whole[a:b])


@pytest.mark.parametrize("tile", [16, 64, 128])
def test_a_rows_bits_do_not_depend_on_how_many_share_its_expert(tile):
    rows, weight = tensor(150, 100), tensor(2, 100, 70)
    many = triton_product(rows, weight, ends([0, 150]), tile=tile)
    for n in (1, 15, 17, 65, 129):
        assert torch.equal(triton_product(rows[:n], weight, ends([0, n]), tile=tile), many[:n])


def test_all_programs_of_a_grid_find_their_work_whatever_the_experts_have():
    # every way to share 33 rows among 3 experts that has a border near a tile's end
    weight, rows = tensor(3, 8, 4), tensor(33, 8)
    for first in (0, 1, 15, 16, 17, 32, 33):
        for second in {0, 1, 16, 33 - first}:
            if first + second <= 33:
                counts = [first, second, 33 - first - second]
                got = triton_product(rows, weight, ends(counts), tile=16)
                assert torch.allclose(got, one_by_one(rows, weight, ends(counts)), atol=1e-5)


def test_a_bias_after_the_product_reaches_the_rows_that_experts_have():
    out, bias, offsets = tensor(19, 20), tensor(4, 20, seed=1), ends([5, 0, 0, 11])
    expected = out.clone()
    for e, (a, b) in enumerate(spans(offsets)):
        expected[a:b] += bias[e]
    _add_bias(out, offsets, bias)
    assert torch.equal(out, expected)


def test_tiles_grow_with_the_rows_an_expert_has():
    assert [tile_rows(rows, 128) for rows in (8, 256, 4096, 65536)] == [16, 16, 64, 128]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 8, 12, 16]), st.sampled_from([1, 8, 12, 16])),
    first=st.integers(0, 2),
    transposed=st.booleans(),
    wider=st.sampled_from([0, 0, 4, 8]),
    shifted=st.sampled_from([0, 0, 4, 8]),
)
def test_what_fits_torchs_kernel_torch_takes(shape, first, transposed, wider, shifted):
    n_experts, depth, columns = shape
    inner = depth if transposed else columns
    outer = columns if transposed else depth
    weight = tensor(n_experts + 2, outer, inner + wider, dtype=torch.bfloat16)[first : first + n_experts, :, :inner]
    weight = weight.transpose(1, 2) if transposed else weight
    rows = tensor(9, depth + shifted, dtype=torch.bfloat16)[:, shifted:]
    if fits_torch(rows, weight):
        offsets = ends([3] * n_experts)
        got = F.grouped_mm(rows, weight, offs=offsets)[: 3 * n_experts]  # which checks the same on a CPU
        assert torch.allclose(got.float(), one_by_one(rows, weight, offsets), atol=0.2)
        assert got.stride() == (columns, 1)
        assert rows.data_ptr() % 16 == 0


def test_the_experts_of_a_served_model_fit_torchs_kernel():
    weight, rows = tensor(4, 48, 32, dtype=torch.bfloat16), tensor(1, 32, dtype=torch.bfloat16)
    assert fits_torch(rows, weight.transpose(1, 2))
    assert fits_torch(rows, weight[1:3].transpose(1, 2))
    assert fits_torch(rows, tensor(4, 32, 48, dtype=torch.bfloat16))
    assert not fits_torch(rows.float(), weight.float().transpose(1, 2))
    assert not fits_torch(rows[:, :30], weight[:, :, :30].transpose(1, 2))


def test_no_row_is_no_work_and_a_cpu_has_no_kernel_of_torch():
    rows, weight = tensor(0, 8), tensor(2, 8, 4)
    assert grouped_product(rows, weight, ends([0, 0])).shape == (0, 4)
    assert not takes_torch(rows.bfloat16(), weight.bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("each", [1, 40, 200])
def test_a_gpu_multiplies_like_one_product_an_expert(dtype, each):
    counts = [each, 0, 3 * each, each // 2 + 1]
    rows, weight = (
        tensor(sum(counts) + 3, 256, dtype=dtype).cuda(),
        tensor(4, 192, 256, dtype=dtype).cuda().transpose(1, 2),
    )
    bias, offsets = tensor(4, 192, dtype=dtype, seed=1).cuda(), ends(counts).cuda()
    for product in (grouped_product, triton_product):
        got = product(rows, weight, offsets, bias)[: sum(counts)].float()
        expected = one_by_one(rows, weight, offsets, bias)
        assert torch.allclose(got, expected, rtol=2e-2, atol=2e-5 if dtype == torch.float32 else 0.2)
        part = product(rows[each:], weight[1:3], ends(counts[1:3]).cuda(), bias[1:3])[: sum(counts[1:3])]
        whole = product(rows, weight, offsets, bias)[each : each + sum(counts[1:3])]
        assert torch.equal(part, whole)
