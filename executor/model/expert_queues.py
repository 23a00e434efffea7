"""What waits at each expert of one MoE layer for one pass: the paper's per-expert queues."""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import numpy as np
import torch


class Queues(Protocol):
    """One pass's rows at the experts of the layer where it stands, and the outputs so far."""

    merge_rows: int  #: longest queue that another pass may merge into its own
    tile: int  #: rows of a tile where a group of experts is one launch (on a GPU), else 0

    @property
    def waiting(self) -> list[int]:
        """Rows that wait at each expert; whoever runs some takes them out."""

    def can_merge(self, expert: int) -> bool:
        """Whether rows wait at `expert`, few enough for another pass to merge them into its own."""

    def span(self, expert: int) -> slice:
        """The rows of `expert`."""

    def rows(self, span: slice) -> torch.Tensor:
        """Hidden states `[S, H]` of these rows."""

    def put(self, span: slice, outputs: torch.Tensor) -> None:
        """Keep the unweighted outputs `[S, H]` of these rows; they may be overwritten."""

    def result(self) -> torch.Tensor:
        """Each token's weighted sum, `[T, H]`; all queues must be empty."""


class ExpertQueues:
    """The queues of a layer without a GPU's kernels: hidden states `[T, H]`, top-k `[T, k]`."""

    holds_activations = True
    tile = 0

    def __init__(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, n_experts: int):
        self._order, counts = sort_by_expert(top_k_index, n_experts)
        self.hidden = hidden
        self.waiting = counts  #: rows that wait at each expert
        self.merge_rows = 0  #: longest queue that another pass may merge into its own
        self._shape = (*top_k_index.shape, hidden.shape[1])
        self._starts = [0, *accumulate(counts)]
        self._token = self._order // top_k_index.shape[-1]
        self._weight = top_k_weights.reshape(-1, 1).index_select(0, self._order)
        # One row for each of a token's k outputs, so that they are summed in the order of its indices. Experts that are
        # not held here (index >= num_experts, under expert parallelism) come last in the order and count for nothing.
        dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
        make = torch.empty if sum(counts) == len(self._order) else torch.zeros
        self._outputs = make((len(self._order), hidden.shape[1]), dtype=dtype, device=hidden.device)

    def can_merge(self, expert: int) -> bool:
        return 0 < self.waiting[expert] <= self.merge_rows

    def span(self, expert: int) -> slice:
        return slice(self._starts[expert], self._starts[expert + 1])

    def rows(self, span: slice) -> torch.Tensor:
        return self.hidden.index_select(0, self._token[span])

    def put(self, span: slice, outputs: torch.Tensor) -> None:
        if outputs.dtype == self._outputs.dtype:
            weighted = outputs.mul_(self._weight[span])
        else:
            weighted = outputs * self._weight[span]
        self._outputs.index_copy_(0, self._order[span], weighted)

    def result(self) -> torch.Tensor:
        return self._outputs.view(self._shape).sum(dim=1)


def sort_by_expert(top_k_index: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, list[int]]:
    """Order of the `T * k` assignments by expert (stable, int64) and the number of rows of each expert."""
    # The one value that the host must know of a layer; on a GPU it comes through a pinned buffer, one synchronisation.
    # No bincount: it waits for the device twice by itself.
    flat = top_k_index.reshape(-1)
    if flat.device.type == "cpu":  # numpy: a tenth of the overhead per call for the few rows of a decode
        ids = flat.numpy()
        return torch.from_numpy(ids.argsort(kind="stable")), np.bincount(ids, minlength=n_experts)[:n_experts].tolist()
    ordered, order = flat.sort(stable=True)
    experts = torch.arange(n_experts, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(ordered, experts, right=True)
    host = torch.empty(n_experts, dtype=ends.dtype, pin_memory=True)
    host.copy_(ends, non_blocking=True)
    ready = torch.Event(flat.device)
    ready.record()
    ready.synchronize()
    return order, host.diff(prepend=host.new_zeros(1)).tolist()
