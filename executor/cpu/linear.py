"""Linear layers and experts, on CPUs in float32 with weights packed for oneDNN.

PyTorch sends float32 matrix products on x86 to MKL, which on some processors reaches half of oneDNN's speed, and reads
a weight matrix slower than memory delivers it when there are few rows. oneDNN's operators are registered with PyTorch
as `mkldnn::_linear_pointwise` and `mkldnn::_reorder_linear_weight`; where they are missing, all is `F.linear`. A kernel
of our own does the products where it can read the packed format (`qllm.executor.cpu.packed_matmul`), else oneDNN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence

import torch
import torch.nn.functional as F

from qllm.executor.cpu.packed_matmul import packed_matmul_of

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
#: oneDNN makes code for each number of rows and keeps that of 1,024 products (1.7 MB each). Prompts bring more numbers
#: of rows than that to experts, and the code was made anew (benchmarks/fidelity/first_passes.py). So oneDNN gets
#: multiples of so many rows.
EVEN_ROWS = 4
PACK_ROWS = 4  # rows that the packed format is chosen for: a decode step brings few to each expert


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for `x` `[..., K]`, `weight` `[N, K]` (packed), `bias` `[N]`."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


def can_pack() -> bool:
    """Whether this PyTorch has oneDNN's packed linear, and it computes what `F.linear` does."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    x, weight = torch.linspace(-1, 1, 10).view(2, 5), torch.linspace(-2, 1, 15).view(3, 5)
    try:
        return torch.allclose(linear(x, pack(weight)), F.linear(x, weight), atol=1e-5)
    except RuntimeError:
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A packed copy of `weight` `[N, K]` (float32, CPU) for `linear`."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_ROWS)
    return packed


class PackedWeights:
    """Packed copies of weights `[N, K]` of one shape (float32, CPU)."""

    def __init__(self, weights: Iterable[torch.Tensor]):
        plain = list(weights)
        self._packed = [pack(weight) for weight in plain]
        self._n, k = plain[0].shape
        self._matmul = packed_matmul_of(self._packed, self._n, k, linear)

    def __len__(self) -> int:
        return len(self._packed)

    def products(self, x: torch.Tensor, which: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """`x` `[S, K]` with weights `which`, `sizes` rows each in turn, to `[S, N]`."""
        # oneDNN's bits of a row may depend on how many rows come with it; those of the kernel depend on the row alone.
        if self._matmul is not None and x.dtype is torch.float32:  # else oneDNN says what is wrong
            return self._matmul.products(x, which, sizes)
        parts = zip(x.split(list(sizes)), which, strict=True)
        outputs = [linear_of_even_size(part, self._packed[weight]) for part, weight in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def linear_of_even_size(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear`, with zeros for rows up to a multiple of EVEN_ROWS."""
    more = -x.shape[0] % EVEN_ROWS
    return linear(F.pad(x, (0, 0, 0, more)), weight)[: x.shape[0]] if more else linear(x, weight)


def pack_model(model: torch.nn.Module, called: Container[torch.nn.Module] | None = None) -> int:
    """Pack the linear layers and experts of a float32 CPU model, free the plain weights; the number packed.

    The parameters keep their shapes but hold NaN without memory; one that several modules share is kept. Only exact
    `torch.nn.Linear` modules are packed: a subclass, for a quantised layer say, has its own forward.
    Of those only the ones that are `called` (None: all of them): another module may read the weight of the others.
    """
    if not can_pack():
        return 0
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    count = 0
    for module in model.modules():
        if type(module) is torch.nn.Linear and packable(module.weight) and (called is None or module in called):
            module.forward = forward_of(PackedWeights([module.weight]), module.bias)  # type: ignore[assignment, method-assign]  # in place of its own
            if users[id(module.weight)] == 1:
                release(module.weight)
            count += 1
        elif hasattr(module, "is_transposed"):  # set by transformers' experts interface
            for name in EXPERT_WEIGHTS:
                weight = getattr(module, name, None)
                if isinstance(weight, torch.nn.Parameter) and weight.dim() == 3 and packable(weight):
                    setattr(
                        module, f"_qllm_{name}", PackedWeights(w.t() if module.is_transposed else w for w in weight)
                    )
                    release(weight)
                    count += len(weight)
    return count


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed format is for such a weight. It cannot hold one without rows or columns."""
    return weight.dtype is torch.float32 and weight.device.type == "cpu" and weight.numel() > 0


def release(parameter: torch.Tensor) -> None:
    """Free a parameter's memory, keep its shape; whoever still reads it gets NaN."""
    parameter.data = torch.full((), float("nan"), dtype=parameter.dtype).expand(parameter.shape)


def forward_of(packed: PackedWeights, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a linear layer with one packed weight."""

    def forward(input: torch.Tensor) -> torch.Tensor:  # the name that torch.nn.Linear.forward gives it
        rows = input.reshape(-1, input.shape[-1])
        out = packed.products(rows, [0], [rows.shape[0]])
        return (out if bias is None else out.add_(bias)).view(*input.shape[:-1], out.shape[-1])

    return forward
