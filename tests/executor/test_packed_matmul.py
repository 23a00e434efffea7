"""The kernel for packed weights computes what oneDNN does, is used where it can be, and steps aside where it cannot."""

import platform
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.cpu import linear, packed_matmul

pytestmark = pytest.mark.skipif(not linear.can_pack(), reason="this PyTorch has no packed linear")


@pytest.fixture(autouse=True, scope="module")
def any_processor():
    """The kernel is right, if slow, on every x86-64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        yield


def weights(n, k, count=3):
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return [torch.randn(n, k, generator=generator) for _ in range(count)]


def plain(x, plain_weights, which, sizes):
    parts = [part.double() @ plain_weights[w].double().t() for w, part in zip(which, x.split(sizes), strict=True)]
    return torch.cat(parts)


def test_it_is_compiled_where_there_is_a_compiler():
    cpu = Path("/proc/cpuinfo")
    avx512 = platform.machine() == "x86_64" and cpu.exists() and "avx512f" in cpu.read_text()
    if not avx512 or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler, Linux, and AVX-512")
    assert packed_matmul.kernel() is not None
    assert linear.PackedWeights(weights(96, 64))._matmul is not None


@settings(deadline=None, max_examples=60)
@given(
    n=st.sampled_from([1, 17, 32, 33, 64, 100, 192]),
    k=st.sampled_from([1, 16, 40, 128, 513, 1100]),  # more than 512 are taken in pieces
    sizes=st.lists(st.sampled_from([0, 1, 2, 5, 6, 7, 13, 48, 97, 385]), min_size=1, max_size=5),  # 384 in one piece
    data=st.data(),
)
def test_products_of_any_sizes(n, k, sizes, data):
    which = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    x = torch.randn(sum(sizes), k, generator=torch.Generator().manual_seed(1))
    got = linear.PackedWeights(weights(n, k)).products(x, which, sizes)
    assert torch.allclose(got.double(), plain(x, weights(n, k), which, sizes), atol=1e-4)


def test_rows_that_do_not_lie_one_after_another_in_memory():
    packed, x = linear.PackedWeights(weights(64, 32)), torch.randn(32, 5).t()
    assert torch.equal(packed.products(x, [1], [5]), packed.products(x.contiguous(), [1], [5]))


@pytest.mark.parametrize(("n", "k"), [(100, 64), (32, 64), (64, 1100)])
def test_a_row_has_the_same_bits_whoever_is_computed_with_it(n, k):
    packed = linear.PackedWeights(weights(n, k))
    if packed._matmul is None:
        pytest.skip("no kernel here")
    x = torch.randn(500, k)
    whole = packed.products(x, [1], [500])
    alone = torch.cat([packed.products(row[None], [1], [1]) for row in x])
    others = packed.products(torch.cat([torch.randn(9, k), x[:7]]), [0, 1], [9, 7])[9:]
    assert torch.equal(whole, alone)
    assert torch.equal(whole[:7], others)


def test_threads_share_the_work_and_change_no_bits():
    packed, x = linear.PackedWeights(weights(192, 64)), torch.randn(1000, 64)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(packed.products(x, [2, 0, 1], [400, 1, 599]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(("shape", "sizes"), [((4, 40), [4, 1]), ((5, 41), [4, 1]), ((40,), [1])])
def test_rows_of_another_number_or_length_are_refused(shape, sizes):
    packed = linear.PackedWeights(weights(64, 40))
    if packed._matmul is None:
        pytest.skip("no kernel here")
    with pytest.raises(ValueError, match=r"5 rows of 40 numbers expected|1 rows of 40"):
        packed.products(torch.zeros(shape), [0, 1][: len(sizes)], sizes)


@pytest.mark.parametrize("what", ["no kernel", "no AVX-512", "another format"])
def test_without_it_onednn_computes_everything(monkeypatch, what):
    if what == "no kernel":
        monkeypatch.setattr(packed_matmul, "kernel", lambda: None)
    elif what == "no AVX-512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    elif packed_matmul.kernel() is not None:  # its products then differ from those of oneDNN
        real = packed_matmul.kernel()
        monkeypatch.setattr(
            packed_matmul, "kernel", lambda: lambda x, out, k, n, stride, *rest: real(x, out, k, n, 64, *rest)
        )
    packed = linear.PackedWeights(weights(192, 40))
    assert packed._matmul is None
    x = torch.randn(6, 40)
    assert torch.allclose(
        packed.products(x, [2, 0], [4, 2]).double(), plain(x, weights(192, 40), [2, 0], [4, 2]), atol=1e-4
    )


def test_a_linear_layer_keeps_the_shape_of_its_input():
    layer = torch.nn.Sequential(torch.nn.Linear(24, 10))
    expected = [layer(torch.ones(*shape, 24)) for shape in ((), (3,), (2, 0), (2, 5, 7))]
    assert linear.pack_model(layer) == 1
    for want in expected:
        got = layer(torch.ones(*want.shape[:-1], 24))
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=1e-5)
