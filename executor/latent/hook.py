"""The hook of layers that expand latents: a pass keeps the latents, and expands those of prompts alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from qllm.executor.latent.form import Expand, Form, find_form
from qllm.executor.latent.latents import Latents
from qllm.executor.model.passes import current_pass
from qllm.executor.unpacked.attention import unpacked

log = logging.getLogger(__name__)

METHOD = "expand_kv"  #: transformers' name for what makes K and V of latents, in all its latent attention


def hook_latents(model: PreTrainedModel) -> int:
    """Have latent attention keep latents; how many layers are hooked.

    Outside of a pass they do what they did. Hooked twice, they are hooked once. Layers whose attention is called for
    one sequence at a time keep their latents without this.
    """
    alone = {part for module, _ in unpacked(model) for part in module.modules()}
    found = [m for m in model.modules() if callable(getattr(m, METHOD, None)) and m not in alone]
    for module in found:
        if not isinstance(getattr(module, METHOD), _Expand):
            setattr(module, METHOD, _Expand(getattr(module, METHOD)))
    return len(found)


def forms(model: torch.nn.Module) -> Iterator[Form]:
    """The forms of the layers that keep latents; known once a pass has run."""
    for module in model.modules():
        hook = getattr(module, METHOD, None)
        if isinstance(hook, _Expand) and hook.form is not None:
            yield hook.form


def keeps_latents(model: torch.nn.Module) -> bool:
    """Whether a layer keeps latents of keys and values; known once a pass has run."""
    return any(True for _ in forms(model))


class _Expand:
    """In place of a module's `expand_kv`."""

    def __init__(self, expand: Expand):
        self.form: Form | None = None
        self._expand = expand
        self._looked = False

    def __call__(self, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each `[1, heads, T, D]`; in a pass of the rows of prompts, or at least of the last row."""
        running = current_pass()
        if running is None:
            return self._expand(latent, rotary)
        if not self._looked:
            self.form = find_form(self._expand, latent, rotary)
            self._looked = True
            if self.form is None:
                log.warning("latent attention of an unknown form: keys and values of all heads are kept")
        if self.form is None:
            return self._expand(latent, rotary)
        first = min(running.batch.decode_rows, latent.shape[2] - 1)
        running.latents = Latents(self.form, self._expand, latent, rotary, first)
        return self._expand(latent[:, :, first:], rotary[:, :, first:])
