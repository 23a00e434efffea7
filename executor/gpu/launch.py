"""How kernels are launched: all through one function, so that whoever records a pass sees each launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

#: Called with (kernel, grid, arguments, constants) in place of the launch, while somebody records.
recorders: list[Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]] = []


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel over `grid` (programs, up to three numbers); constants include num_warps and the like."""
    if recorders:
        recorders[-1](kernel, tuple(grid), arguments, constants)
    else:
        kernel[tuple(grid)](*arguments, **constants)
