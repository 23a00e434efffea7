"""Sequences in scattered blocks of a paged cache, and attention over them by plain PyTorch in float32."""

import torch


class PagedWorld:
    """K and V of sequences of these lengths; whatever slot holds none of them is NaN."""

    def __init__(
        self,
        lengths: list[int],
        heads: int = 2,
        kv_heads: int = 1,
        widths: tuple[int, int] = (8, 8),
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ):
        self.heads, self.kv_heads, self.widths, self.block_size = heads, kv_heads, widths, block_size
        self.dtype, self.device = dtype, device
        self.random = torch.Generator().manual_seed(seed)
        tables = [-(-length // block_size) for length in lengths]
        scattered = torch.randperm(sum(tables) + 2, generator=self.random).to(device)
        self.blocks = scattered[: sum(tables)]
        self.first = [sum(tables[:i]) for i in range(len(tables))]
        slots = (sum(tables) + 2) * block_size + 1
        self.keys, self.values = (
            torch.full((slots, kv_heads, width), float("nan"), dtype=dtype, device=device) for width in widths
        )
        self.kv = [[self.draw(length, kv_heads, width) for width in widths] for length in lengths]
        for sequence, (key, value) in enumerate(self.kv):
            into = self.slots(sequence, len(key))
            self.keys[into], self.values[into] = key, value

    def slots(self, sequence: int, n: int) -> torch.Tensor:
        """Of the first `n` positions."""
        table = self.blocks[self.first[sequence] :, None] * self.block_size
        return (table + torch.arange(self.block_size, device=self.device)).flatten()[:n]

    def forget(self, sequence: int, n: int) -> None:
        """The first `n` positions hold NaN from now on, as where another has had their blocks."""
        slots = self.slots(sequence, n)
        self.keys[slots] = self.values[slots] = float("nan")

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).to(self.device, self.dtype)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def attend(
        self,
        q: torch.Tensor,
        sequence: int,
        position: int,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q `[heads, Dk]` at `position` of a sequence, `[heads, Dv]` in float32."""
        low = 0 if window is None else max(0, position + 1 - window)
        group = self.heads // self.kv_heads
        key, value = (t[low : position + 1].float().repeat_interleave(group, 1) for t in self.kv[sequence])
        logits = torch.einsum("hd,khd->hk", q.float(), key) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if sinks is not None:
            logits = torch.cat([logits, sinks.float()[:, None]], 1)
        weights = logits.softmax(-1)[:, : len(key)]
        return torch.einsum("hk,khd->hd", weights, value)
