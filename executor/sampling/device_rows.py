"""Rows on an accelerator that have a state: what changes their logits, and what their clients are told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qllm.executor.sampling.logprobs import Logprobs
from qllm.executor.sampling.params import SamplingParams
from qllm.executor.sampling.row_state import RowState


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` on the device; nobody waits for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu" or not array.size:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def changed_on_device(
    logits: torch.Tensor,
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    generated: Sequence[int],
    states: Sequence[RowState | None],
) -> torch.Tensor:
    """Copies of these rows of `[rows, vocab]`, float32, with penalties and biases, without what a grammar forbids.

    Each step sends the ids and factors of the tokens that a row has seen. Nothing of it stays on the device, so a
    request takes no memory there while it waits.
    """
    device, vocab = logits.device, logits.shape[1]
    copies = logits.index_select(0, send(np.array(rows, dtype=np.int64), device)).float()
    shifts = [(at, state.shifts) for at, i in enumerate(rows) if (state := states[i]) and state.shifts is not None]
    if shifts:
        places = send(np.concatenate([at * vocab + each.ids for at, each in shifts]), device)
        bias, repetition, taken = send(np.concatenate([each.factors for _, each in shifts], axis=1), device)
        flat = copies.view(-1)
        found = flat.index_select(0, places) + bias
        found = torch.where(found > 0, found / repetition, found * repetition) - taken
        flat.index_copy_(0, places, found)
    bound = [(at, i, state) for at, i in enumerate(rows) if (state := states[i]) and state.matcher is not None]
    if bound:
        bits = np.stack([state.allowed(params[i], generated[i], vocab) for _, i, state in bound])
        sent = send(bits, device)
        allowed = (sent[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
        which = send(np.array([at for at, _, _ in bound], dtype=np.int64), device)
        kept = copies.index_select(0, which).masked_fill_(allowed.flatten(1)[:, :vocab] == 0, float("-inf"))
        copies.index_copy_(0, which, kept)
    return copies


def logprobs_on_device(logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[int], top: int) -> torch.Tensor:
    """Of each of these rows of `[rows, vocab]`, float64 `[rows, 1 + 2 top]`, read by `read_logprobs`.

    First comes its token's logprob, then the ids of the `top` most likely tokens, then their logprobs.
    """
    which = send(np.array(rows, dtype=np.int64), logits.device)
    values = logits.index_select(0, which).float()
    total = values.logsumexp(-1, keepdim=True)
    chosen = values.gather(1, tokens.index_select(0, which).clamp(min=0)[:, None])
    best, ids = values.topk(top)
    return torch.cat([(chosen - total).double(), ids.double(), (best - total).double()], dim=1)


def read_logprobs(numbers: Sequence[float], width: int, top: int) -> Logprobs:
    """One row of `logprobs_on_device`, of which `top` of `width` tokens are wanted."""
    ids, values = numbers[1 : 1 + top], numbers[1 + width : 1 + width + top]
    return Logprobs(numbers[0], tuple((int(id), value) for id, value in zip(ids, values, strict=True)))
