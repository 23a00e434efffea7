#!/usr/bin/env bash
# transformers: a custom experts function is ignored, without a word, by models whose experts do not ask for it.
#
# One would guess: set_experts_implementation("mine") either makes the model call the function that is registered as
# "mine", or raises, as set_experts_implementation("grouped_mm") does for a model that cannot.
# What happens: for "grouped_mm" such a model raises. For "batched_mm" and for registered functions nothing is raised,
# no warning is given, and the model goes on with its own code. get_experts_implementation() still says "eager".
# To be sure: compare get_experts_implementation() with what was set.
# Versions: transformers 5.23.0, torch 2.13.0. Seen with jetmoe, llama4_text, doge and longcat_flash; not with mixtral.
# Documented: https://huggingface.co/docs/transformers/experts_interface, which does not say what other models do.
# Run: 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import logging
import sys
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

calls, logged = [], []


class Keep(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())


logging.getLogger("transformers").addHandler(Keep(logging.WARNING))


def mine(self, hidden_states, top_k_index, top_k_weights):
    calls.append(type(self).__name__)
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register("mine", mine)
small = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)


def attempt(family, name, **more):
    """(what set_experts_implementation did, what the model says then, calls of `mine` in a forward pass, warnings)"""
    calls.clear()
    logged.clear()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **more)).eval()
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        try:
            model.set_experts_implementation(name)
            did = "accepted"
        except ValueError as error:
            did = f"raised: {error}"
        model(torch.arange(10)[None])
    return did, model.get_experts_implementation()[""], len(calls), len(told) + len(logged)


seen = {(f, n): attempt(f, n, **more) for f, more in (("mixtral", {}), ("jetmoe", {"kv_channels": 32}))
        for n in ("grouped_mm", "batched_mm", "mine")}
for (family, name), (did, says, count, told) in seen.items():
    print(f"{family:8} {name:10} {did}; now {says}; calls of mine: {count}; warnings: {told}")
same = (
    seen["mixtral", "mine"][:3] == ("accepted", "mine", 2)
    and seen["jetmoe", "grouped_mm"][0].startswith("raised")
    and all(seen["jetmoe", name] == ("accepted", "eager", 0, 0) for name in ("batched_mm", "mine"))
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
