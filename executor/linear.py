"""`linear(x, weight, bias)`, through oneDNN on CPUs in float32.

PyTorch sends float32 matrix products on x86 to MKL, which on some processors reaches half of oneDNN's speed, and less
with few rows (benchmarks/linear_kernels.py prints both). oneDNN's fused linear is registered with PyTorch as
`mkldnn::_linear_pointwise`; it takes plain tensors and computes in float32. Elsewhere this is `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for `x` `[..., K]`, `weight` `[N, K]`, `bias` `[N]`."""
    if _ONEDNN is not None and x.dtype is torch.float32 and x.device.type == "cpu":
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_onednn(model: torch.nn.Module) -> int:
    """Send the plain `torch.nn.Linear` layers of a float32 CPU model through `linear`; returns how many.

    Only exact `torch.nn.Linear` modules: a subclass (quantised, say) has its own forward.
    """
    if _ONEDNN is None:
        return 0
    count = 0
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype is torch.float32 and module.weight.is_cpu:
            module.forward = _bound(module)  # type: ignore[assignment, method-assign]
            count += 1
    return count


def _bound(module: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:  # the name that torch.nn.Linear.forward gives it
        return linear(input, module.weight, module.bias)

    return forward
