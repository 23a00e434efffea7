"""Makes the checkpoint that the engines are compared on: a Qwen3-MoE of 165.6 M random float32 weights.

    python tools/make_moe.py FOLDER [--seed 0]

8 layers, hidden 512, 32 experts (384 wide), top 4, vocabulary 8,000. Its tokenizer splits at spaces into words t2 to
t7999, so that a server that insists on one can load it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from qllm.executor.demo import small_config

VOCAB = 8000
CONFIG = small_config(vocabulary=VOCAB, hidden=512, width=384, experts=32)


def make(folder: str | Path, seed: int = 0) -> Path:
    """Write the checkpoint (config, weights, tokenizer; 660 MB) to `folder`, unless it holds one; returns `folder`."""
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").exists():  # written last
        torch.manual_seed(seed)
        Qwen3MoeForCausalLM(CONFIG).to(torch.float32).save_pretrained(folder)
        words = {"<bos>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, VOCAB)}
        splitter = Tokenizer(models.WordLevel(words, unk_token="t2"))
        splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        PreTrainedTokenizerFast(
            tokenizer_object=splitter, bos_token="<bos>", eos_token="<eos>", pad_token="<bos>"
        ).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = make(args.folder, args.seed)
    parameters = sum(p.numel() for p in Qwen3MoeForCausalLM.from_pretrained(folder).parameters())
    print(f"{folder}: {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
