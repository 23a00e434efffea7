#!/usr/bin/env bash
# bitsandbytes 4-bit leaves the experts of Mixture-of-Experts models in 16 bits, without a word.
#
# One would guess: from_pretrained(..., BitsAndBytesConfig(load_in_4bit=True)) makes Mixtral about four times smaller, as
# it does a dense model, and says so where it does not.
# What happens: transformers 5 keeps all experts of a layer in one three-dimensional parameter. The 4-bit conversion
# replaces nn.Linear modules alone, so the attention becomes 4-bit and the experts, nine tenths of the weights, stay as
# they were. No warning is given and `is_loaded_in_4bit` is true.
# Versions: transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0, on a CPU.
# Reported: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849 (open).
# Run: 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0

"$folder/venv/bin/python" - "$folder/model" <<'PY'
import logging
import sys
import warnings

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

told = []  # warnings, and what transformers logs as one


class Keep(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())


logging.getLogger("transformers").addHandler(Keep(logging.WARNING))
config = MixtralConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)
whole = MixtralForCausalLM(config).to(torch.bfloat16)
whole.save_pretrained(sys.argv[1])
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu",
                                                 quantization_config=BitsAndBytesConfig(load_in_4bit=True))
experts = {p.dtype for name, p in model.named_parameters() if ".experts." in name}
attention = {p.dtype for name, p in model.named_parameters() if "_proj.weight" in name}
share = sum(p.numel() for n, p in whole.named_parameters() if ".experts." in n) / whole.num_parameters()
told += [str(warning.message) for warning in found]
about = [text for text in told if any(word in text.lower() for word in ("expert", "4bit", "4-bit", "quanti"))]
print(f"is_loaded_in_4bit: {model.is_loaded_in_4bit}")
print(f"attention: {attention}, experts: {experts} ({share:.0%} of the weights)")
print(f"bytes: {whole.get_memory_footprint():,} in bfloat16, {model.get_memory_footprint():,} 'in 4 bits'")
print(f"warnings about it: {about or 'none'}")
same = model.is_loaded_in_4bit and attention == {torch.uint8} and experts == {torch.bfloat16} and not about
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
