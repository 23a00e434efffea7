"""Prints which MoE model families of the installed transformers can be served, and why the others cannot.

    python tools/list_model_families.py

Each family is built tiny, with random weights, and put through the checks that a real checkpoint meets at load.
"""

from __future__ import annotations

import torch
import transformers

from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import families, tiny_model


def verdict(model_type: str | None) -> str:
    """Empty where a model of that type is served, else the reason why not."""
    if model_type is None:
        return "no causal language model registered with AutoModelForCausalLM"
    try:
        prepare_model(tiny_model(model_type))
    except UnsupportedModelError as error:
        return str(error).removeprefix(f"{model_type}: ")
    return ""


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = {package: verdict(model_type) for package, model_type in families().items()}
    served = [package for package, reason in verdicts.items() if not reason]
    print(f"transformers {transformers.__version__}: {len(served)} of {len(verdicts)} families are served\n")
    print(", ".join(served) + "\n")
    print("| refused | reason |\n|---|---|")
    for package, reason in verdicts.items():
        if reason:
            print(f"| {package} | {reason} |")


if __name__ == "__main__":
    main()
