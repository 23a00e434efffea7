"""Products with many packed weights in one call (`packed_matmul.cpp`), on CPUs with AVX-512.

A product of oneDNN's costs about 13 microseconds besides its arithmetic, and a decode step needs two for each expert
that it hits. oneDNN also makes code for each number of rows that it sees. The kernel has neither cost. It computes a
row with the same bits whatever comes with it, reads oneDNN's own packed weights and shares PyTorch's OpenMP team. It is
compiled at installation; without it, or where the packed format is another, oneDNN does all products.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from qllm.executor.cpu.openmp import runtime

STRIP = 64  # outputs in a strip of the packed format, as in packed_matmul.cpp


@cache
def kernel() -> Callable[..., None] | None:
    """The compiled kernel, with PyTorch's OpenMP runtime as its first argument; None where there is none."""
    spec, openmp = importlib.util.find_spec("qllm.executor.cpu._packed_matmul"), runtime()
    if spec is None or spec.origin is None or openmp is None:
        return None
    try:
        run, parallel = ctypes.CDLL(spec.origin).qllm_products, openmp.GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.restype = None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    run.argtypes = [pointer, pointer, pointer, count, count, count, count, pointer, pointer, pointer]
    address = ctypes.cast(parallel, pointer)
    return lambda *args: run(address, *args)


class PackedMatmul:
    """Products with packed weights `[n, k]` of one shape; knows where their strips of STRIP outputs lie in memory."""

    def __init__(self, packed: Sequence[torch.Tensor], n: int, k: int):
        self._packed = packed  # keeps the memory
        self._n, self._k = n, k
        self._addresses = np.array([torch.ops.mkldnn.data_ptr(w) for w in packed], dtype=np.int64)
        self._stride = torch.ops.mkldnn._nbytes(packed[0]) // 4 // -(-n // STRIP)

    def products(self, x: torch.Tensor, which: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """float32 `x` `[S, k]` with weights `which`, `sizes` rows each in turn, to `[S, n]`. Raises ValueError."""
        run = kernel()
        if run is None:
            raise RuntimeError("no compiled kernel: packed_matmul_of() would have said so")
        last = np.cumsum(sizes, dtype=np.int64)
        if x.shape != (last[-1], self._k):
            raise ValueError(f"{last[-1]} rows of {self._k} numbers expected, not {tuple(x.shape)}")
        x, first, addresses = x.contiguous(), last - sizes, self._addresses[list(which)]
        out = x.new_empty(x.shape[0], self._n)
        run(
            x.data_ptr(),
            out.data_ptr(),
            self._k,
            self._n,
            self._stride,
            len(addresses),
            addresses.ctypes.data,
            first.ctypes.data,
            last.ctypes.data,
        )
        return out


def packed_matmul_of(
    packed: Sequence[torch.Tensor], n: int, k: int, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> PackedMatmul | None:
    """The kernel over packed weights `[n, k]`; None without it, or where they are packed in another way."""
    # The format may change with oneDNN's version, the processor and the shape: products are compared with `product`.
    # Without AVX-512 the kernel's vectors do not fit the registers: 64 rows an expert took 13 times oneDNN's time.
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not avx512 or kernel() is None or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    n_strips = -(-n // STRIP)
    sizes = {torch.ops.mkldnn._nbytes(w) for w in packed}
    if len(sizes) != 1 or min(sizes) % (4 * n_strips) or min(sizes) < 4 * n_strips * STRIP * k:
        return None
    matmul, x = PackedMatmul(packed, n, k), torch.linspace(-2, 3, k).sin().expand(len(packed), k)
    out = matmul.products(x, range(len(packed)), [1] * len(packed))
    expected = torch.cat([product(x[:1], w) for w in packed])
    tolerance = 1e-4 * float(expected.abs().nan_to_num(0, 0).max())
    return matmul if torch.allclose(out, expected, rtol=1e-3, atol=tolerance, equal_nan=True) else None
