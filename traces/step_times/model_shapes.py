"""Shapes of the MoE models that the project's data files speak of, from their published config.json."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per weight. int4: 4 bits plus one 16-bit scale per group of 128 (GPTQ, AWQ, Marlin).
# nf4: 4 bits plus one 32-bit scale per block of 64 (bitsandbytes' default, without double quantisation).
WEIGHT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "int8": 1.0, "int4": 0.5 + 2 / 128, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one MoE model. `inter` is one expert's, `shared_inter` that of all shared experts together (0: none)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    experts: int
    top_k: int
    vocab: int
    shared_inter: int = 0
    dense_layers: int = 0  # leading layers with a plain MLP of width dense_inter
    dense_inter: int = 0
    tied: bool = False  # embedding and LM head share their weights
    latent_kv: int = 0  # values kept per token and layer by multi-head latent attention (0: plain K and V)

    @property
    def qkv_width(self) -> int:
        """Columns of the joint Q, K, V projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.inter

    def other_weights(self) -> int:
        """Weights outside the routed experts (latent attention: its projections counted as plain ones)."""
        attention = self.hidden * (self.qkv_width + self.heads * self.head_dim)
        moe_layer = self.hidden * self.experts + 3 * self.hidden * self.shared_inter
        dense = self.dense_layers * 3 * self.hidden * self.dense_inter
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * attention + (self.layers - self.dense_layers) * moe_layer + dense + embeddings

    def weights_bytes(self, expert_dtype: str = "bf16", other_dtype: str = "bf16") -> int:
        """Bytes of all weights, experts and the rest each in their own type (keys of WEIGHT_BYTES)."""
        experts = (self.layers - self.dense_layers) * self.experts * self.expert_weights
        return round(experts * WEIGHT_BYTES[expert_dtype] + self.other_weights() * WEIGHT_BYTES[other_dtype])

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV cache per token, all layers."""
        return self.layers * (self.latent_kv or 2 * self.kv_heads * self.head_dim) * bytes_per_value


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 8, 2, 32000),
        ModelShape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 128, 8, 151936),
        ModelShape("olmoe-1b-7b", 16, 2048, 16, 16, 128, 1024, 64, 8, 50304),
        ModelShape("gpt-oss-20b", 24, 2880, 64, 8, 64, 2880, 32, 4, 201088),
        ModelShape(
            "deepseek-v2-lite",
            *(27, 2048, 16, 16, 128, 1408, 64, 6, 102400),
            shared_inter=2816,
            dense_layers=1,
            dense_inter=10944,
            latent_kv=576,
        ),
    )
}
