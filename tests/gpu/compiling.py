"""Compiles every kernel for GPUs that need not be there: run as a module, without TRITON_INTERPRET.

A case calls a function of `qllm.executor.gpu` with tensors on the CPU. Its launches are recorded, not run, and each
kernel is compiled for its arguments, as a GPU's launch would compile it. To have yours compiled, add a line to CASES.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from qllm.executor.gpu.decode_attention import DecodeWork, decode_attention, scratch_for
from qllm.executor.gpu.kv_write import write_kv
from qllm.executor.gpu.launch import recorders
from qllm.executor.gpu.tile_attention import TileWork, tile_attention
from tests.gpu.expert_cases import EXPERT_CASES

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a block's, on a generation's smallest GPU
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


def numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def attention(dtype: torch.dtype, key_width: int, value_width: int, group: int, **options: Any) -> None:
    """All attention kernels, over 4 KV heads."""
    q, out = torch.zeros(64, 4 * group, key_width, dtype=dtype), torch.zeros(64, 4 * group, value_width, dtype=dtype)
    keys, values = torch.zeros(33, 4, key_width, dtype=dtype), torch.zeros(33, 4, value_width, dtype=dtype)
    options = {"block_size": 16, "scale": 0.1, **options}
    work = DecodeWork(numbers(9), numbers(64), numbers(64), numbers(64), numbers(1))
    decode_attention(q, keys, values, work, out, scratch=scratch_for(9, 4 * group, value_width, "cpu"), **options)
    tile_attention(q, keys, values, TileWork(numbers(9), *(numbers(2) for _ in range(4))), out, **options)
    write_kv(keys, values, numbers(64), q[:, :4], out[:, :4])


def latents(dtype: torch.dtype, heads: int) -> None:
    """Latent attention of DeepSeek's widths: one key for all heads, whose first 512 columns are the value."""
    q, sums = torch.zeros(64, heads, 576, dtype=dtype), torch.zeros(64, heads, 512, dtype=dtype)
    kept = torch.zeros(33, 1, 576, dtype=dtype)
    work = DecodeWork(numbers(9), numbers(64), numbers(64), numbers(64), numbers(1))
    scratch = scratch_for(9, heads, 512, "cpu")
    decode_attention(q, kept, kept[..., :512], work, sums, scratch=scratch, block_size=16, scale=0.1)
    write_kv(kept[..., :512], kept[..., 512:], numbers(64), q[:, :1, :512], q[:, :1, 512:])


SINKS = {"sinks": torch.zeros(64)}
HALF, SINGLE = torch.bfloat16, torch.float32

#: Each launches kernels with tensors on the CPU, which may hold anything.
CASES: list[Callable[[], None]] = [
    lambda: attention(HALF, 128, 128, 8),
    lambda: attention(SINGLE, 128, 128, 8),
    lambda: attention(HALF, 256, 256, 2),
    lambda: attention(SINGLE, 256, 256, 16),
    lambda: attention(HALF, 192, 128, 1, window=100, softcap=30.0, **SINKS),
    lambda: latents(HALF, 128),
    lambda: latents(SINGLE, 20),
    *EXPERT_CASES,
]


def compile_launch(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], capability: int) -> Any:
    """The compiled kernel, specialized as a launch with these arguments would be."""
    options = {name: constants[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in constants}
    signature, fixed, attributes = {}, {}, {}
    given = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], fixed[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            aligned = not parameter.do_not_specialize_on_alignment
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    """Compile every launch of every case, and say what each kernel takes."""
    launches: list[tuple[Any, ...]] = []
    recorders.append(lambda *launch: launches.append(launch))
    for case in CASES:
        case()
    for kernel, _, arguments, constants in launches:
        for capability in CAPABILITIES:
            compiled = compile_launch(kernel, arguments, constants, capability)
            shared = compiled.metadata.shared
            print(f"{kernel.__name__} on {capability}: {shared} bytes of shared memory", flush=True)
            assert shared <= SHARED_BYTES[capability], (
                f"{kernel.__name__}: {shared} bytes of shared memory are too many"
            )


if __name__ == "__main__":
    main()
