"""What a run of the engine records of its passes, in the terms of the simulator's timeline."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from qllm.scheduler import Pass
from qllm.traces.results import PassSlice


@dataclass
class RunRecorder:
    """Records passes from a moment on."""

    origin: float  #: seconds on the engine's clock at that moment
    passes: int  #: launched until then
    slices: list[PassSlice] = field(default_factory=list)  #: in seconds since `origin`
    #: by pass id, see `RunningPass.kept_routing`
    routing: dict[int, list[list[int]] | torch.Tensor] = field(default_factory=dict)

    def record(
        self,
        p: Pass,
        start: float,
        end: float,
        first: tuple[int, int],
        last: int,
        place: tuple[int, str],
        suspended: bool,
    ) -> None:
        """`p` ran from `first` (steps done, layer) to `last` steps done, and stands at `place` (layer, stage)."""
        self.slices.append(
            PassSlice(
                start=start - self.origin,
                end=end - self.origin,
                pass_id=p.id - self.passes,
                priority=p.priority(),
                prefills=len(p.prefill),
                decodes=p.n_decode,
                tokens=p.tokens,
                first=first[0],
                last=last,
                first_layer=first[1],
                layer=place[0],
                stage=place[1],
                suspended=suspended,
            )
        )

    def counts(self) -> list[np.ndarray]:
        """Tokens per expert of each finished pass, int64[MoE layers, experts], in the order of their launches."""
        return [_counts(self.routing[id]) for id in sorted(self.routing)]


def _counts(kept: list[list[int]] | torch.Tensor) -> np.ndarray:
    if isinstance(kept, torch.Tensor):
        return np.diff(kept.cpu().numpy().astype(np.int64), axis=1, prepend=0)
    return np.array(kept, dtype=np.int64)
