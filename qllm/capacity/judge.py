"""Which requests of a run miss their SLO, and whether a run that goes on can still meet it.

The rules are those of `qllm.experiment.metrics.within`, on the arrays of one run.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from qllm.config.config import Config
from qllm.config.from_config import isolated, load_timings, scheduler_limits
from qllm.experiment.metrics import BOUNDS, after_warmup
from qllm.scheduler import Request
from qllm.sim import RunResult, Status
from qllm.traces.requests.trace import RequestTrace

_LOOKS = 64  #: how often a run is looked at before its last request has arrived


class Judge:
    """The SLOs of one run.

    Args:
        config: Says which SLO each class has, the warm-up, and the share of its requests that are to meet it.
        trace: The requests of the run.

    Attributes:
        sent: Requests after the warm-up, by class, int64[classes of the trace].
        judged: Whether a request counts and has an SLO, bool[n].
        together: `sent` of all runs that are judged as one; of this run alone, until somebody adds others.
        missed: Misses of those of them that are over, by class.
    """

    def __init__(self, config: Config, trace: RequestTrace):
        n = len(trace)
        self.attainment = config.capacity.attainment
        self.classes, self.cls = trace.classes, trace.cls
        arrivals = pd.DataFrame({"arrival_s": trace.arrival})
        self.counts = np.zeros(n, dtype=bool)
        self.counts[after_warmup(arrivals, config.warmup).index] = True
        self.sent = self._per_class(self.counts)
        self.together, self.missed = self.sent, np.zeros_like(self.sent)
        slos = [config.classes[name].slo for name in trace.classes]
        bounds = {
            key: np.array([getattr(slo, key, None) or np.inf for slo in slos])[trace.cls] if slos else np.empty(0)
            for key in BOUNDS
        }
        self.bounds = {key: bound for key, bound in bounds.items() if np.isfinite(bound).any()}
        self.judged = self.counts & np.array([slo is not None for slo in slos])[trace.cls]
        self.gaps = np.where(trace.output_tokens > 1, trace.output_tokens - 1.0, np.inf)  # one token meets any TPOT
        self.alone = np.full(n, np.nan)
        if "ttft_over_isolated" in self.bounds:
            mine = np.isfinite(self.bounds["ttft_over_isolated"]) & fits(config, trace)
            self.alone[mine] = isolated(config, trace.prompt_tokens[mine])
        self._asked, self._every = 0, max(1, n // _LOOKS)

    def _per_class(self, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(self.cls[chosen], minlength=len(self.classes))

    def _beyond(self, i: np.ndarray, arrival: np.ndarray, first: np.ndarray, end: np.ndarray) -> dict[str, np.ndarray]:
        """By bound, which of the requests `i` are beyond it; seconds, `first` nan where there is no token yet."""
        begun = np.where(np.isnan(first), end, first)
        value = {
            "ttft": lambda: begun - arrival,
            "ttft_over_isolated": lambda: (begun - arrival) / self.alone[i],
            "tpot": lambda: (end - begun) / self.gaps[i],
            "e2e": lambda: end - arrival,
        }
        return {key: value[key]() > bound[i] for key, bound in self.bounds.items()}

    def misses(self, result: RunResult) -> dict[str, np.ndarray]:
        """Requests that miss, by class: under "" those that miss any bound, and those that miss each bound.

        A request that has ended as anything but finished misses all its bounds.
        """
        i = np.arange(len(self.cls))
        beyond = self._beyond(i, result.arrival, result.first_token, result.finish)
        unserved = result.status != Status.FINISHED
        missed = {key: (np.isfinite(self.bounds[key]) & unserved) | over for key, over in beyond.items()}
        missed[""] = unserved.copy()
        for key in beyond:
            missed[""] |= missed[key]
        return {key: self._per_class(self.judged & over) for key, over in missed.items()}

    def fails(self, misses: np.ndarray) -> np.ndarray:
        """Of each class, whether so many misses beside `missed` are too many, bool[classes]."""
        good = self.together - self.missed - misses
        return np.asarray((good < self.together) & (good / np.maximum(self.together, 1) < self.attainment))

    def hopeless(self, now: float, result: RunResult, requests: Mapping[int, Request]) -> bool:
        """Whether some class cannot meet its SLO any more; looked at some `_LOOKS` times in a run.

        Who waits longer than its bound already has missed it, whatever comes.
        """
        self._asked += 1
        if self._asked % self._every:
            return False
        done = np.flatnonzero((result.status == Status.FINISHED) & self.judged)
        beyond = self._beyond(done, result.arrival[done], result.first_token[done], result.finish[done])
        missed = (result.status == Status.REJECTED) & self.judged
        for over in beyond.values():
            missed[done] |= over
        waiting = np.fromiter((i for i in requests if self.judged[i]), dtype=np.int64)
        if len(waiting):
            first = np.array([requests[i].first_token for i in waiting.tolist()])
            beyond = self._beyond(waiting, result.arrival[waiting], first, np.full(len(waiting), now))
            for over in beyond.values():
                missed[waiting] |= over
        return bool(self.fails(self._per_class(missed)).any())


def fits(config: Config, trace: RequestTrace) -> np.ndarray:
    """Which requests the KV memory has room for, alone, bool[n]; the scheduler refuses the others."""
    limits = scheduler_limits(config, load_timings(config.timings))
    room = float(limits.kv_blocks or np.inf) * limits.block_size
    return np.asarray(trace.prompt_tokens + trace.output_tokens - 1 <= room)
