"""What waits at each expert of one MoE layer on a GPU, where the layer is cut or its rows may be merged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch

from qllm.executor.gpu.expert_rows import combine, sort_rows
from qllm.executor.gpu.grouped_product import tile_rows


class DeviceQueues:
    """One pass's rows `[T, H]` at the experts of the layer where it stands (`ExpertQueues` on a GPU).

    How many rows each expert has reaches the host without holding up what is launched meanwhile. Outputs are kept in
    the order of the experts and summed as those of a layer that is not cut, with the same bits.
    """

    holds_activations = True

    def __init__(
        self,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        n_experts: int,
        slots: torch.Tensor,
    ):
        self.merge_rows = 0  #: longest queue that another pass may merge into its own
        self.tile = tile_rows(top_k_index.numel(), n_experts)  #: rows of a tile of a product, cut or not
        self.hidden = hidden
        self._rows = sort_rows(top_k_index, n_experts, slots)
        self._ends, self._ready = to_host(self._rows.offsets)
        self._token = self._rows.token
        self._weights = top_k_weights
        self._outputs = hidden.new_empty((len(self._token), hidden.shape[1]))

    @property
    def ends(self) -> torch.Tensor:
        """Where the rows of each expert end, on the device."""
        return self._rows.offsets

    @cached_property
    def waiting(self) -> list[int]:
        """Rows that wait at each expert."""
        return [stop - start for start, stop in zip(self._starts, self._starts[1:], strict=False)]

    @cached_property
    def _starts(self) -> Sequence[int]:
        if self._ready is not None:
            self._ready.synchronize()
        return [0, *self._ends.tolist()]

    def can_merge(self, expert: int) -> bool:
        return 0 < self.waiting[expert] <= self.merge_rows

    def span(self, expert: int) -> slice:
        return slice(self._starts[expert], self._starts[expert + 1])

    def rows(self, span: slice) -> torch.Tensor:
        return self.hidden.index_select(0, self._token[span])

    def put(self, span: slice, outputs: torch.Tensor) -> None:
        self._outputs[span] = outputs

    def result(self) -> torch.Tensor:
        return combine(self._outputs, self._rows, self._weights, self.hidden.dtype)


def to_host(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Event | None]:
    """`ends` in host memory, and what to wait for before they are there."""
    if ends.device.type == "cpu":
        return ends, None
    host = torch.empty(ends.shape, dtype=ends.dtype, pin_memory=True)
    host.copy_(ends, non_blocking=True)
    ready = torch.Event(ends.device)
    ready.record()
    return host, ready


def ends_on(device: torch.device, rows: Sequence[int]) -> torch.Tensor:
    """Where the rows of each expert end, int32 on `device`, for `rows` rows each."""
    ends = torch.tensor([*accumulate(rows)], dtype=torch.int32)
    return ends if device.type == "cpu" else ends.pin_memory().to(device, non_blocking=True)
