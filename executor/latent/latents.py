"""What a layer keeps of a pass's tokens where its attention is latent, and how they are attended to."""

from __future__ import annotations

import torch

from qllm.executor.latent.form import Expand, Form


class Latents:
    """Latents and rotary parts of a pass's rows in one layer, on their way from `expand_kv` to the attention hook."""

    holds_activations = True

    def __init__(self, form: Form, expand: Expand, latent: torch.Tensor, rotary: torch.Tensor, first: int):
        self.form = form
        self.first = first  #: the row that expanded K and V begin with
        rows = torch.cat((latent, rotary), dim=-1)[0].transpose(0, 1)
        self.kept = (rows, rows[..., :0])  #: for the stores of K, `[T, 1, C + R]`, and V, which needs none of its own
        self._expand = expand

    def as_kv(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, for one head, as rows that decode attend to them: what is kept, and the latents in it."""
        return kept, kept[..., : self.form.latent_width]

    def expanded(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all heads, each `[n, heads, D]`, from what is kept of n tokens, `[n, 1, C + R]`."""
        latent, rotary = kept.transpose(0, 1)[None].tensor_split((self.form.latent_width,), dim=-1)
        keys, values = self._expand(latent, rotary)
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)
