"""How keys and values of all heads follow from the latent of a token, as a layer's own `expand_kv` makes them.

With a latent c and a rotary part r that all heads share, head h has the key [A_h c, r] and the value C_h c
(DeepSeek-V2, arXiv 2405.04434, section 2.1). So a query [a, b] meets the key in the product of [A_h' a, b] with [c, r]:
attention over the latents themselves, with one key of their width for all heads, and sums of latents as its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: `expand_kv` of transformers: latents `[1, 1, T, C]` and rotary parts `[1, 1, T, R]` to K and V, `[1, heads, T, D]`
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8}  #: relative, of products; of 16 bits COARSE
COARSE = 3e-2


@dataclass(frozen=True)
class Form:
    """The matrices of one layer, and where in a key the rotary part is."""

    keys: torch.Tensor  #: A, `[heads, Dk - R, C]`
    values: torch.Tensor  #: C transposed, `[heads, C, Dv]`
    own: slice  #: of a key or query: what the latent makes ...
    shared: slice  #: ... and the rotary part

    @property
    def latent_width(self) -> int:
        """C."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.keys.nbytes + self.values.nbytes

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[n, heads, Dk]` as they meet latents and rotary parts, `[n, heads, C + R]`."""
        meeting = torch.bmm(q[..., self.own].transpose(0, 1), self.keys).transpose(0, 1)
        return torch.cat((meeting, q[..., self.shared]), dim=-1)

    def results(self, sums: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents, `[n, heads, C]`, as those of values `[n, heads, Dv]`."""
        return torch.bmm(sums.transpose(0, 1), self.values).transpose(0, 1)


def find_form(expand: Expand, latent: torch.Tensor, rotary: torch.Tensor) -> Form | None:
    """The form of a layer, read off what `expand` makes of unit vectors; None where it makes keys in another way.

    Args:
        expand: of the layer.
        latent: `[1, 1, T, C]`, any: its width, type and device count.
        rotary: `[1, 1, T, R]`, the same.
    """
    latent_units, rotary_units = (torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) for t in (latent, rotary))
    keys, values = both(expand, latent_units, rotary_units.new_zeros(len(latent_units), len(rotary_units)))
    turned, nothing = both(expand, latent_units.new_zeros(len(rotary_units), len(latent_units)), rotary_units)
    width = keys.shape[-1] - len(rotary_units)
    last, first = slice(width, None), slice(0, len(rotary_units))
    shared = next(
        (place for place in (last, first) if torch.equal(turned[..., place], rotary_units.expand(len(turned), -1, -1))),
        None,
    )
    if shared is None or width < 1 or nothing.any():
        return None
    own = slice(0, width) if shared is last else slice(len(rotary_units), None)
    form = Form(keys[..., own].mT.contiguous(), values.contiguous(), own, shared)
    return form if agrees(form, expand, latent_units, rotary_units) else None


def both(expand: Expand, latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[heads, T, D]` of latents `[T, C]` and rotary parts `[T, R]`."""
    keys, values = expand(latents[None, None], rotary[None, None])
    return keys[0], values[0]


def agrees(form: Form, expand: Expand, *units: torch.Tensor) -> bool:
    """Whether `form` says what `expand` does with any vectors, not with unit vectors alone."""
    c, r = (torch.sin(torch.arange(1.0, 1 + 2 * len(u), device=u.device)).view(2, -1).to(u.dtype) for u in units)
    keys, values = both(expand, c, r)
    wanted = torch.cat((form.keys @ c.T, r.T.expand(len(keys), -1, -1)), 1).mT  # rotary last
    found = torch.cat((keys[..., form.own], keys[..., form.shared]), -1)
    near = ROUNDING.get(c.dtype, COARSE)
    pairs = ((found, wanted), (values, c @ form.values))
    return all(float((a - b).float().norm()) <= near * float(b.float().norm()) for a, b in pairs)
