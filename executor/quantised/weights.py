"""What all weights of experts in fewer bits have in common: one of them is expanded at a time, when rows meet it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

AT_ONCE = 1 << 19  # weights that a CPU looks at together: what comes between fits its cache


def rows_at_once(columns: int, device: torch.device) -> int:
    """Rows of `columns` weights that are expanded together."""
    return max(1, AT_ONCE // columns) if device.type == "cpu" else 1 << 30  # a GPU minds launches, not memory


class QuantisedWeights(torch.nn.Module):
    """Weights `[N, K]` of a layer's experts, all of one shape. A module, so that they go where the model goes."""

    form: str  #: as results name it: "nf4", "fp8", "mxfp4"
    codes: torch.Tensor
    scales: torch.Tensor

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.codes.nbytes + self.scales.nbytes

    def _room(self, dtype: torch.dtype) -> torch.Tensor:
        """Memory for one expanded weight."""
        raise NotImplementedError

    def _expand(self, which: int, room: torch.Tensor) -> torch.Tensor:
        """Write weight number `which` to `room`; its `[N, K]`."""
        raise NotImplementedError

    def expanded(self, which: int, dtype: torch.dtype) -> torch.Tensor:
        """Weight number `which`, `[N, K]` of type `dtype`: computed in float32, rounded once."""
        return self._expand(which, self._room(dtype))

    def products(self, x: torch.Tensor, which: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """`x` `[S, K]` with weights `which`, `sizes` rows each in turn, to `[S, N]`. One is expanded at a time."""
        room = self._room(x.dtype)  # one after the other
        parts = zip(x.split(list(sizes)), which, strict=True)
        found = [F.linear(part, self._expand(weight, room)) for part, weight in parts]
        return found[0] if len(found) == 1 else torch.cat(found)
