"""Launches of the kernels of experts and norms, to be compiled for GPUs (see compiling.py)."""

from collections.abc import Callable
from functools import partial

import torch

from qllm.executor.gpu.expert_rows import SortedRows, combine, sort_rows
from qllm.executor.gpu.fused.gate import silu_and_mul
from qllm.executor.gpu.fused.norms import rms_norm
from qllm.executor.gpu.fused.rotary import rotate
from qllm.executor.gpu.grouped_product import _add_bias, triton_product


def ends(n_experts: int) -> torch.Tensor:
    return torch.zeros(n_experts, dtype=torch.int32)


def numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def rows(dtype: torch.dtype) -> None:
    for tokens in (1, 33, 1024):
        sort_rows(numbers(tokens, 8), 128, numbers(tokens))
    for weights in (dtype, torch.float32):
        sorted_rows = SortedRows(numbers(264), numbers(264), ends(128))
        combine(torch.zeros(264, 2048, dtype=dtype), sorted_rows, torch.zeros(33, 8, dtype=weights), dtype)


def products(dtype: torch.dtype) -> None:
    for tile in (16, 64, 128):
        triton_product(torch.zeros(264, 512, dtype=dtype), torch.zeros(8, 256, 512, dtype=dtype).mT, ends(8), tile=tile)
    # GPT-OSS's depth is no multiple of 128; another, of nothing
    hidden, bias = torch.zeros(264, 320, dtype=dtype), torch.zeros(3, 320, dtype=dtype)
    triton_product(hidden, torch.zeros(3, 320, 320, dtype=dtype), ends(3), bias, tile=16)
    triton_product(hidden[:, :45], torch.zeros(3, 45, 35, dtype=dtype), ends(3), tile=128)
    _add_bias(hidden, ends(3), bias)


def layers(dtype: torch.dtype) -> None:
    silu_and_mul(torch.zeros(264, 1536, dtype=dtype), ends(128))
    for form in range(3):
        rms_norm(torch.zeros(33, 2048, dtype=dtype), torch.zeros(2048, dtype=dtype), 1e-6, form)
    for tokens in (1, 40):
        heads = torch.zeros(1, tokens, 40, 128, dtype=dtype)
        rms_norm(heads[:, :, :32], torch.zeros(128, dtype=dtype), 1e-6, 0)
        q, k = heads[:, :, :32].transpose(1, 2), heads[:, :, 32:].transpose(1, 2)
        for form, width in (("whole", 128), ("part", 96), ("halves", 64)):
            cos = torch.zeros(1, tokens, width, dtype=dtype)
            rotate(q, k, cos, cos, form)


EXPERT_CASES: list[Callable[[], None]] = [
    partial(case, dtype) for case in (rows, products, layers) for dtype in (torch.bfloat16, torch.float32)
]
