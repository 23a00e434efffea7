"""Checkpoints in FP8 and MXFP4 as they are released, made of plain ones, for tests and benchmarks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from qllm.executor.quantised.blocks import E2M1, MX_BLOCK

FILE = "model.safetensors"
LINEAR = re.compile(r"(proj|proj_with_mqa|experts\.\d+\.w[123])\.weight$|experts\.(gate_up|down)_proj$")
MOST = {"fp8": 448.0, "mxfp8": 448.0, "mxfp4": 6.0}  # the largest number of each form


def quantise_checkpoint(plain: Path, folder: Path, method: str, block: tuple[int, int] | None = None) -> None:
    """Write a checkpoint like the one in `plain`, a single file, whose linear layers are quantised by `method`.

    Args:
        plain: as transformers saves it.
        folder: to write to.
        method: "fp8" or "mxfp8", all projections; "mxfp4", the fused experts of gpt-oss.
        block: outputs and inputs that share a scale; None: all of a weight, or 32 inputs for the last two methods.
    """
    shutil.copytree(plain, folder)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / FILE).items():
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[f"{name}_blocks"], weights[f"{name}_scales"] = to_mxfp4(weight.mT.contiguous())
        elif method != "mxfp4" and LINEAR.search(name):
            size = block or ((1, MX_BLOCK) if method == "mxfp8" else (weight.shape[-2], weight.shape[-1]))
            weights[name], weights[f"{name}_scale_inv"] = to_fp8(weight, size, powers=method == "mxfp8")
        else:
            weights[name] = weight
    save_file(weights, folder / FILE, {"format": "pt"})
    settings: dict[str, Any] = {"quant_method": method}
    if method != "mxfp4":
        given = [1, MX_BLOCK] if method == "mxfp8" else block and list(block)
        settings |= {"activation_scheme": "dynamic", "weight_block_size": given}
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))


def to_fp8(weight: torch.Tensor, block: tuple[int, int], *, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes `[..., N, K]` of weights, and the scales of their blocks: float32, or powers of two as uint8."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scales = blocks.abs().amax(dim=(-3, -1)).clamp(min=1e-12) / MOST["fp8"]
    if powers:
        scales = scales.log2().ceil().exp2()
    codes = (blocks / scales.unsqueeze(-1).unsqueeze(-3)).reshape(padded.shape)[..., :rows, :columns]
    codes = codes.to(torch.float8_e4m3fn).contiguous()
    return codes, _exponents(scales) if powers else scales


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[..., N, K / 32, 16]` of weights `[..., N, K]`, two values a byte, and scales `[..., N, K / 32]`."""
    blocks = weight.float().unflatten(-1, (-1, MX_BLOCK))
    scales = (blocks.abs().amax(dim=-1).clamp(min=1e-12) / MOST["mxfp4"]).log2().ceil().exp2()
    relative = blocks / scales.unsqueeze(-1)
    levels = torch.tensor(E2M1)
    codes = torch.bucketize(relative.abs(), (levels[1:] + levels[:-1]) / 2) + 8 * (relative < 0)
    codes = codes.to(torch.uint8)
    return codes[..., ::2] + 16 * codes[..., 1::2], _exponents(scales)


def _exponents(scales: torch.Tensor) -> torch.Tensor:
    return (scales.log2() + 127).round().to(torch.uint8)
