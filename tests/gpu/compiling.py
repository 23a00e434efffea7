"""Compiles what is launched, for GPUs that are not there. Triton must not interpret in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from qllm.executor.gpu.launch import recorders

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = 99 * 1024  #: what a program may have on every GPU from 8.0
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compiled(calls: Callable[[], Any], capabilities: tuple[int, ...] = CAPABILITIES) -> Iterator[tuple[str, int, Any]]:
    """(kernel's name, capability, compiled kernel) of each launch that `calls` makes, on tensors of any device."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    recorders.append(lambda kernel, grid, arguments, constants: launches.append((kernel, arguments, constants)))
    try:
        calls()
    finally:
        recorders.pop()
    for kernel, arguments, constants in launches:
        for capability in capabilities:
            yield kernel.fn.__name__, capability, _compile(kernel, arguments, constants, capability)


def _compile(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], capability: int) -> Any:
    signature, fixed, attributes = {}, {}, {}
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in constants or value == 1 or isinstance(value, bool):
            signature[name], fixed[(place,)] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
