"""Shapes of MoE models, from their published config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qllm.traces.messages import clipped, suggestion
from qllm.traces.step_times.file_format import MOST_EXPERTS, TimingError

# Bytes per weight. int4: 4 bits plus one 16-bit scale per group of 128 (GPTQ, AWQ, Marlin).
# nf4: 4 bits plus one 32-bit scale per block of 64 (bitsandbytes' default, without double quantisation).
# mxfp4 and nvfp4: 4 bits plus one 8-bit scale per block of 32 or 16.
WEIGHT_BYTES = {
    **{"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0, "int8": 1.0},
    **{"int4": 0.5 + 2 / 128, "nf4": 0.5 + 4 / 64, "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16},
}
_MAY_BE_ZERO = (
    *("shared_inter", "dense_layers", "dense_inter", "window", "window_layers", "max_context"),
    *("latent_kv", "latent_rope", "latent_q", "value_dim"),
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one MoE model. `inter` is one expert's, `shared_inter` that of all shared experts together (0: none).

    Multi-head latent attention (DeepSeek) has `latent_kv`; its `head_dim` is that of a key without its position.

    Raises:
        TimingError: A size is impossible; the message names it.
    """

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
    latent_kv: int = 0  # values kept per token and layer by latent attention: kv_lora_rank + rope (0: plain K and V)
    window: int = 0  # tokens that the attention of `window_layers` of the layers sees (0: all, in every layer)
    window_layers: int = 0
    max_context: int = 0  # tokens that a sequence may have (0: not stated)
    latent_rope: int = 0  # of `latent_kv`, those that carry the position; a key has as many more than head_dim
    latent_q: int = 0  # rank that latent attention's queries are projected through (0: straight)
    value_dim: int = 0  # values of a head, where it differs from head_dim (0: it does not)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), int(f.name not in _MAY_BE_ZERO)
            if f.type == "int" and (type(value) is not int or not least <= value < 1 << 40):
                raise self._error(f"{f.name} is {value!r:.60}, must be a whole number of at least {least}")
            if f.type == "bool" and type(value) is not bool:
                raise self._error(f"{f.name} is {value!r:.60}, must be true or false")
        if type(self.name) is not str or not self.name:
            raise self._error(f"name is {self.name!r}, must be a text")
        for key, most in (("top_k", "experts"), ("kv_heads", "heads"), ("window_layers", "layers")):
            if getattr(self, key) > getattr(self, most):
                raise self._error(f"{key} is {getattr(self, key)}, must be at most {most} ({getattr(self, most)})")
        if self.heads % self.kv_heads:
            raise self._error(f"heads is {self.heads}, must be a multiple of kv_heads ({self.kv_heads})")
        if self.dense_layers >= self.layers:
            raise self._error(f"dense_layers is {self.dense_layers}, must be less than layers ({self.layers})")
        pairs = (("window", "window_layers"), ("dense_layers", "dense_inter"), ("latent_kv", "latent_rope"))
        for one, other in pairs:
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise self._error(f"{one} is {getattr(self, one)} and {other} is {getattr(self, other)}: both or none")
        if self.latent_kv and self.latent_rope >= self.latent_kv:
            raise self._error(f"latent_rope is {self.latent_rope}, must be less than latent_kv ({self.latent_kv})")
        if self.latent_q and not self.latent_kv:
            raise self._error(f"latent_q is {self.latent_q}, must be 0 without latent_kv")
        if self.layers * self.experts > MOST_EXPERTS:
            raise self._error(f"layers x experts is {self.layers * self.experts}, must be at most {MOST_EXPERTS}")

    def _error(self, problem: str) -> TimingError:
        return TimingError(f"model {self.name!r:.80}: {problem}")

    @property
    def qkv_width(self) -> int:
        """Columns of the projections before the attention: Q, K and V, or what latent attention makes of them."""
        if self.latent_kv:
            return self.latent_q + self.latent_kv + self.heads * self.key_dim
        return self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.head_value)

    @property
    def key_dim(self) -> int:
        """Values of a head's query and key."""
        return self.head_dim + self.latent_rope

    @property
    def head_value(self) -> int:
        """Values of a head's V."""
        return self.value_dim or self.head_dim

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.inter

    def gemms(self) -> dict[str, list[tuple[int, int]]]:
        """(n, k) of each GEMM [m, k] x [k, n] outside the routed experts, by step of a pass."""
        before = [(self.qkv_width, self.hidden)]
        if self.latent_kv:
            queries = self.heads * self.key_dim
            before = [(queries + self.latent_kv, self.hidden)]
            if self.latent_q:
                before = [(self.latent_q + self.latent_kv, self.hidden), (queries, self.latent_q)]
        after = [(self.hidden, self.heads * self.head_value), (self.experts, self.hidden)]
        if self.shared_inter:
            after += [(2 * self.shared_inter, self.hidden), (self.hidden, self.shared_inter)]
        return {"dense_pre": before, "dense_post": after, "head": [(self.vocab, self.hidden)]}

    @property
    def latent_gemm(self) -> tuple[int, int]:
        """(n, k) of the GEMM that makes K and V of what latent attention keeps."""
        return self.heads * (self.head_dim + self.head_value), self.latent_kv - self.latent_rope

    def other_weights(self) -> int:
        """Weights outside the routed experts."""
        gemms = self.gemms()
        before = sum(n * k for n, k in gemms["dense_pre"])
        if self.latent_kv:
            before += self.latent_gemm[0] * self.latent_gemm[1]
        out, *moe = (n * k for n, k in gemms["dense_post"])
        dense = self.dense_layers * 3 * self.hidden * self.dense_inter
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * (before + out) + (self.layers - self.dense_layers) * sum(moe) + dense + embeddings

    def weights_bytes(self, expert_dtype: str = "bf16", other_dtype: str = "bf16") -> int:
        """Bytes of all weights, experts and the rest each in their own type (keys of WEIGHT_BYTES)."""
        experts = (self.layers - self.dense_layers) * self.experts * self.expert_weights
        return round(experts * WEIGHT_BYTES[expert_dtype] + self.other_weights() * WEIGHT_BYTES[other_dtype])

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV cache per token, in the layers that keep all tokens; where each has a window, as if none had."""
        return (self.layers - self.window_layers or self.layers) * self.kv_bytes_per_layer(bytes_per_value)

    def kv_bytes_per_layer(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV per token in one layer."""
        return (self.latent_kv or self.kv_heads * (self.head_dim + self.head_value)) * bytes_per_value

    def sequence_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV that a long sequence keeps in the layers with a window, beside others: those of the window."""
        return (self.window_layers % self.layers) * self.window * self.kv_bytes_per_layer(bytes_per_value)


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 8, 2, 32000, max_context=32768),
        ModelShape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 128, 8, 151936, max_context=40960),
        ModelShape("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 1536, 128, 8, 151936, max_context=40960),
        ModelShape("olmoe-1b-7b", 16, 2048, 16, 16, 128, 1024, 64, 8, 50304, max_context=4096),
        *(
            ModelShape(
                f"gpt-oss-{size}",
                *(layers, 2880, 64, 8, 64, 2880, experts, 4, 201088),
                window=128,
                window_layers=layers // 2,
                max_context=131072,
            )
            for size, layers, experts in (("20b", 24, 32), ("120b", 36, 128))
        ),
        ModelShape(
            "deepseek-v2-lite",
            *(27, 2048, 16, 16, 128, 1408, 64, 6, 102400),
            shared_inter=2816,
            dense_layers=1,
            dense_inter=10944,
            latent_kv=576,
            latent_rope=64,
            max_context=163840,
        ),
        ModelShape(
            "deepseek-v3",
            *(61, 7168, 128, 128, 128, 2048, 256, 8, 129280),
            shared_inter=2048,
            dense_layers=3,
            dense_inter=18432,
            latent_kv=576,
            latent_rope=64,
            latent_q=1536,
            max_context=163840,
        ),
    )
}

# The type of the experts' weights in which a model is published, where that is not bf16.
PUBLISHED = {"gpt-oss-20b": "mxfp4", "gpt-oss-120b": "mxfp4", "deepseek-v3": "fp8"}


def known_model(model: str) -> str:
    """The key of SHAPES that is meant: "Qwen/Qwen3-30B-A3B" is qwen3-30b-a3b. TimingError lists all."""
    name = model.strip().rsplit("/", 1)[-1].lower()
    if name not in SHAPES:
        raise TimingError(f"unknown model {clipped(model)!r}; {suggestion(name, SHAPES)}")
    return name
