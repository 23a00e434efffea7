"""Makes the checkpoint that the engines are compared on: a Qwen3-MoE of 165.6 M random float32 weights.

    python benchmarks/make_moe.py FOLDER [--seed 0]

8 layers, hidden 512, 32 experts (384 wide), top 4, vocabulary 8,000. Its tokenizer splits at spaces into words t2 to
t7999, so that a server that insists on one can load it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 8000
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCAB,
    hidden_size=512,
    intermediate_size=384,
    moe_intermediate_size=384,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    max_position_embeddings=16384,
    initializer_range=0.05,  # with the usual 0.02 at this size, every prompt is continued with the same few tokens
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)


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
