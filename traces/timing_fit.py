"""The expert-layer model t = base + sum_e f(m_e), fitted to measured MoE layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from traces.interpolate import isotonic
from traces.timing_format import TimingError


@dataclass(frozen=True)
class ExpertFit:
    """t_layer = base + sum_e f(m_e), from rows in which every active expert has the same number of tokens.

    tokens: int64[n], tokens per expert; seconds: float64[n], f at these; base: seconds per layer call; error: largest
    and mean relative error of the fit on the rows it was made from.
    """

    base: float
    tokens: np.ndarray
    seconds: np.ndarray
    error_max: float
    error_mean: float

    def layer(self, counts: np.ndarray) -> float:
        """Seconds of one MoE layer whose experts get `counts` tokens (int[experts])."""
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.tokens[-1] - self.tokens[-2])
        above = np.maximum(counts - self.tokens[-1], 0) * slope
        f = np.where(counts > 0, np.interp(counts, self.tokens, self.seconds) + above, 0.0)
        return float(self.base + f.sum())


def balanced_counts(tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Tokens per expert when `tokens` x `top_k` assignments are spread as evenly as can be, int64[experts]."""
    share, rest = divmod(tokens * top_k, experts)
    return np.array([share + 1] * rest + [share] * (experts - rest))


def fit_experts(layer: pd.Series, experts: int, top_k: int) -> ExpertFit:
    """Fit base and f to a balanced table: `layer` is seconds by number of tokens.

    Rows with fewer than `experts` assignments have one token in each of tokens x top_k experts, so their times lie on
    a line: base + active * f(1), fitted by least squares on relative errors, together with the first row in which all
    experts have one token where there is one. From the other rows, f(m) = (t - base) / experts, then isotonic.
    """
    tokens = layer.index.to_numpy(dtype=np.int64)
    seconds = layer.to_numpy(dtype=float)
    assigned = tokens * top_k
    few = assigned <= experts
    if few.sum() < 2:
        raise TimingError(
            f"the base needs 2 rows of at most {experts} assignments (tokens x top_k); there are {few.sum()}"
        )
    design = np.stack([np.ones(few.sum()), assigned[few]], axis=1) / seconds[few, None]
    base, one = np.linalg.lstsq(design, np.ones(few.sum()), rcond=None)[0]
    base = max(float(base), 0.0)
    full = assigned > experts
    sizes = np.concatenate([[1], np.maximum(assigned[full] // experts, 1)])
    times = np.concatenate([[one], (seconds[full] - base) / experts])
    sizes, at = np.unique(sizes, return_index=True)
    fit = ExpertFit(base, sizes, isotonic(times[at]), 0.0, 0.0)
    errors = [
        abs(fit.layer(balanced_counts(int(n), top_k, experts)) / t - 1) for n, t in zip(tokens, seconds, strict=True)
    ]
    return ExpertFit(base, fit.tokens, fit.seconds, float(max(errors)), float(np.mean(errors)))
