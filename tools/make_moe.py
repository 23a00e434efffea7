"""Makes the checkpoint that the engines are compared on: a Qwen3-MoE of 165.6 M random float32 weights.

    python tools/make_moe.py FOLDER [--seed 0]

`qllm.executor.testing.make_checkpoint` says what it is made of.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from qllm.executor.testing import make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = make_checkpoint(args.folder, args.seed)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    print(f"{folder}: {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
