#!/usr/bin/env bash
# transformers expands FP8 experts that lie stacked in one tensor without their scales.
#
# One would guess: a checkpoint whose FP8 experts of a layer lie in one tensor, gate_up_proj and gate_up_proj_scale_inv
# (names and shapes of transformers' own FP8Experts; Mistral-Small-4-119B-2603 is released so, with one scale for each
# expert), is expanded by dequantize=True, which is what happens unasked on a machine without a GPU, or with an A100.
# What happens: the scales are dropped, with a line in a table of "unexpected" weights at the level of a warning, and the
# raw FP8 numbers become the weights of all experts: off by thousands of times. The same experts in one tensor each are
# expanded rightly.
# Versions: transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, on a CPU.
# Documented: nowhere; the quantiser's serialized_names know "weight" alone (quantizers/quantizer_finegrained_fp8.py).
# Run: 2026-11-29.
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
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Experts

EXPERTS = 4
LAYER = "model.layers.0.mlp.experts."
config = Qwen3MoeConfig(vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
                        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS,
                        num_experts_per_tok=2)
folder = Path(sys.argv[1])
torch.manual_seed(0)
Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "plain")
plain = load_file(folder / "plain" / "model.safetensors")
names = ("gate_proj", "up_proj", "down_proj")
codes, scales, expected = {}, {}, {}
for e in range(EXPERTS):
    for name in names:
        weight = plain[f"{LAYER}{e}.{name}.weight"].float()
        scales[name, e] = (weight.abs().max() / 448).reshape(1, 1)
        codes[name, e] = (weight / scales[name, e]).to(torch.float8_e4m3fn)
        expected[name, e] = codes[name, e].float() * scales[name, e]


def stack(of, name):
    return torch.stack([of[name, e].view(torch.uint8) if of is codes else of[name, e] for e in range(EXPERTS)])


def error(stacked):
    """Relative error of all down_proj weights after loading."""
    tensors = {name: weight for name, weight in plain.items() if ".experts." not in name}
    if stacked:  # gate and up of an expert share a scale, as one tensor has one
        for e in range(EXPERTS):
            both = torch.cat([codes["gate_proj", e].view(torch.uint8), codes["up_proj", e].view(torch.uint8)])
            tensors.setdefault(LAYER + "gate_up_proj", []).append(both)
        tensors[LAYER + "gate_up_proj"] = torch.stack(tensors[LAYER + "gate_up_proj"]).view(torch.float8_e4m3fn)
        tensors[LAYER + "gate_up_proj_scale_inv"] = stack(scales, "gate_proj")
        tensors[LAYER + "down_proj"] = stack(codes, "down_proj").view(torch.float8_e4m3fn)
        tensors[LAYER + "down_proj_scale_inv"] = stack(scales, "down_proj")
    else:
        for name, e in codes:
            tensors[f"{LAYER}{e}.{name}.weight"] = codes[name, e]
            tensors[f"{LAYER}{e}.{name}.weight_scale_inv"] = scales[name, e]
    to = folder / f"stacked{stacked}"
    config.save_pretrained(to)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None,
                "modules_to_not_convert": ["self_attn", "gate", "lm_head"], "dequantize": True}
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    loaded = AutoModelForCausalLM.from_pretrained(to, dtype=torch.bfloat16).state_dict()
    got = loaded[LAYER + "down_proj"].float()
    right = stack(expected, "down_proj")
    return float((got - right).norm() / right.norm())


with torch.device("meta"):
    packed = FP8Experts(config, has_gate=True)
print("FP8Experts has", *(f"{name} {list(p.shape)}" for name, p in packed.named_parameters() if p is not None))
apart, stacked = error(False), error(True)
print(f"experts in a tensor each: relative error {apart:.1%}")
print(f"experts stacked in a tensor: relative error {stacked:.0%}")
same = apart < 0.01 and stacked > 1
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
