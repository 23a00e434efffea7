#!/usr/bin/env bash
# Triton's interpreter multiplies the bits of bfloat16 numbers, and cuts where a GPU rounds.
#
# One would guess: a kernel that runs with TRITON_INTERPRET=1 gives the values that it gives on a GPU, or is refused. So
# the kernels of an engine that serves in bfloat16 can be tested on a CPU in bfloat16.
# What happens: bfloat16 is kept as 16-bit whole numbers. tl.dot of two such tensors multiplies these: results are around
# 1e10 where the products are around 1. A cast from float32 to bfloat16 drops the low bits, where a GPU rounds to nearest.
# Neither warns. The same kernel in float16 or float32 is right.
# Versions: triton 3.7.1, torch 2.13.0, on a CPU.
# Reported: https://github.com/triton-lang/triton/issues/11584 (closed, "we just don't support it yet").
# Run: 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6

cat > "$folder/kernels.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


numbers = torch.Generator().manual_seed(0)
off = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    a, b = (torch.randn(16, 16, generator=numbers).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    product[(1,)](a, b, c, 16)
    off[dtype] = float((c - a.float() @ b.float()).abs().max())
    print(f"tl.dot of two {dtype} matrices: off by at most {off[dtype]:.3g}")

x = torch.full((16,), 1 + 3 / 512)  # three quarters of the way from 1 to the next number, 1 + 1/128
y = torch.empty(16, dtype=torch.bfloat16)
cast[(1,)](x, y, 16)
print(f"{x[0]} cast to bfloat16: {float(y[0])} in the interpreter, {float(x[0].to(torch.bfloat16))} in PyTorch")

as_found = off[torch.bfloat16] > 1e6 and max(off[torch.float16], off[torch.float32]) < 1e-2 and float(y[0]) == 1.0
print("as described" if as_found else "CHANGED")
sys.exit(not as_found)
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernels.py"
