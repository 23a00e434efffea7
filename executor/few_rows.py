"""Products of few rows with many packed weights in one call (`few_rows.cpp`), on CPUs with AVX-512.

A product of oneDNN's costs about 13 microseconds besides reading the weights, and a decode step needs two for each
expert that it hits. The kernel reads oneDNN's own packed weights, so that nothing is held twice, and shares PyTorch's
OpenMP team. It is compiled when the package is installed, where there is a C++ compiler; without it, or where the
packed format is another, oneDNN does all products.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from executor.openmp import runtime

MOST_ROWS = 48  # for one weight; with more, oneDNN's products are as fast
STRIP = 64  # outputs in a strip of the packed format, as in few_rows.cpp


@cache
def kernel() -> Callable[..., None] | None:
    """The compiled kernel, with PyTorch's OpenMP runtime as its first argument; None where there is none."""
    spec, openmp = importlib.util.find_spec("executor._few_rows"), runtime()
    if spec is None or spec.origin is None or openmp is None:
        return None
    try:
        run, parallel = ctypes.CDLL(spec.origin).qllm_few_rows, openmp.GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.restype = None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    run.argtypes = [pointer, pointer, pointer, count, count, count, count, pointer, pointer, pointer]
    address = ctypes.cast(parallel, pointer)
    return lambda *args: run(address, *args)


class Strips:
    """Where the strips of packed weights `[n, k]`, all of one shape, lie in memory."""

    def __init__(self, packed: Sequence[torch.Tensor], n: int, k: int):
        self._packed = packed  # keeps the memory
        self._n, self._k = n, k
        self._addresses = np.array([torch.ops.mkldnn.data_ptr(w) for w in packed], dtype=np.int64)
        self._stride = torch.ops.mkldnn._nbytes(packed[0]) // 4 // -(-n // STRIP)

    def products(
        self, x: torch.Tensor, out: torch.Tensor, weights: Sequence[int], first: Sequence[int], last: Sequence[int]
    ) -> None:
        """Into rows `first[i]` to `last[i]` of `out` `[S, n]`, those of `x` `[S, k]` times weight `weights[i]`."""
        run = kernel()
        if run is None:
            raise RuntimeError("no compiled kernel: strips_of() would have said so")
        if x.shape[1] != self._k:
            raise ValueError(f"rows of {x.shape[1]} numbers for weights of {self._k}")
        addresses, starts, ends = self._addresses[list(weights)], np.array(first), np.array(last)
        run(
            x.data_ptr(),
            out.data_ptr(),
            self._k,
            self._n,
            self._stride,
            len(addresses),
            addresses.ctypes.data,
            starts.ctypes.data,
            ends.ctypes.data,
        )


def strips_of(
    packed: Sequence[torch.Tensor], n: int, k: int, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Strips | None:
    """The strips of oneDNN's packed weights `[n, k]`; None without the kernel or where they are packed in another way.

    The format is oneDNN's own affair and may change with its version, the processor and the shape; so the kernel's
    products with each weight are compared with those of oneDNN (`product(x, weight)`) before it is trusted.
    """
    if kernel() is None or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    n_strips = -(-n // STRIP)
    sizes = {torch.ops.mkldnn._nbytes(w) for w in packed}
    if len(sizes) != 1 or min(sizes) % (4 * n_strips) or min(sizes) < 4 * n_strips * STRIP * k:
        return None
    strips, x = Strips(packed, n, k), torch.linspace(-2, 3, k).sin().expand(len(packed), k).contiguous()
    out = x.new_empty(len(packed), n)
    rows = range(len(packed) + 1)
    strips.products(x, out, rows[:-1], rows[:-1], rows[1:])
    expected = torch.cat([product(x[:1], w) for w in packed])
    tolerance = 1e-4 * float(expected.abs().nan_to_num(0, 0).max())
    return strips if torch.allclose(out, expected, rtol=1e-3, atol=tolerance, equal_nan=True) else None
