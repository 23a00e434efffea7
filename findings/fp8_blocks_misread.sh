#!/usr/bin/env bash
# transformers expands FP8 weights by blocks of equal size, not of the size that the checkpoint states.
#
# One would guess: with "weight_block_size": [128, 128] a matrix of 192 rows has a block of 128 rows and one of 64, as the
# checkpoints that DeepSeek published and the kernels for them have it; loading with dequantize=True multiplies each
# weight by its block's scale, on a machine without FP8 kernels too.
# What happens: the block is worked out as rows / scales. 192 rows with 2 scales become two blocks of 96, so a sixth of
# the rows get the wrong scale: the weights are off by tens of percent, without a warning. Where the division leaves a
# rest (576 rows and 5 scales, the kv_a_proj_with_mqa of DeepSeek-V3), loading ends with an error instead.
# Versions: transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, on a CPU.
# Documented: nowhere; the code is Fp8Dequantize._dequantize_one in transformers/integrations/finegrained_fp8.py.
# Run: 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0

"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK = 128


def blocks(n):
    return [(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def to_fp8(weight):
    """(FP8 weight, scale of each block, what they stand for), blocks of BLOCK x BLOCK, the last ones smaller."""
    packed, plain = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(len(blocks(len(weight))), len(blocks(weight.shape[1])))
    for i, (top, bottom) in enumerate(blocks(weight.shape[0])):
        for j, (left, right) in enumerate(blocks(weight.shape[1])):
            part = weight[top:bottom, left:right].float()
            scales[i, j] = part.abs().max() / 448
            packed[top:bottom, left:right] = (part / scales[i, j]).to(torch.float8_e4m3fn)
            plain[top:bottom, left:right] = packed[top:bottom, left:right].float() * scales[i, j]
    return packed, scales, plain


def expanded(width):
    """Largest relative error of the up_proj weights after loading, or the error's text."""
    folder = Path(sys.argv[1]) / f"model{width}"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=256, intermediate_size=width, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():  # rows of growing size, as norms fold into trained weights: neighbouring scales differ
        model.model.layers[0].mlp.up_proj.weight.mul_(torch.linspace(1, 4, width)[:, None])
    model.save_pretrained(folder)
    tensors, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors[name], tensors[name + "_scale_inv"], plain[name] = to_fp8(weight)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16,
            quantization_config=FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True))
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    name = "model.layers.0.mlp.up_proj.weight"
    got = loaded.state_dict()[name].float()
    return float((got - plain[name]).norm() / plain[name].norm())


found = {width: expanded(width) for width in (256, 192, 576)}
for width, what in found.items():
    print(f"{width} rows in blocks of {BLOCK}: {what if isinstance(what, str) else f'relative error {what:.1%}'}")
same = found[256] < 0.01 and not isinstance(found[192], str) and found[192] > 0.05 and isinstance(found[576], str)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
