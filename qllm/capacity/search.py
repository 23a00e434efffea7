"""The capacity of one policy, on one seed or on several together, by bisection over the rate.

A seed draws the same requests at every rate, on a time axis that is stretched: common random numbers, so that two rates
differ by the rate alone. Two things bound the rate:

    saturation  what the device serves in the end: requests / makespan of a run that offers twice that much
    SLO         the share of each class within its SLO, at rates up to saturation

A run whose misses are too many already ends there (`Judge.hopeless`); it fails whatever comes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qllm.capacity.judge import Judge, fits
from qllm.config.config import Config
from qllm.config.schema import Replay
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.run import LAST_ARRIVAL_S, Run, simulate_run
from qllm.sim import RunResult, Status
from qllm.traces.requests.trace import RequestTrace

SATURATION = "saturation"  #: what bounds the rate where no SLO does
HALVINGS = 12  #: of the rate, from saturation down, until an SLO counts as one that no rate meets
_OVERLOAD = 2.0  #: times what the device serves, to measure that
_PROBE = 500  #: requests of a first guess, where their number depends on the rate
_FEWEST = 10  #: requests that are expected at the lowest rate


@dataclass(frozen=True)
class Found:
    """What was found; rates in requests per second of all classes.

    Attributes:
        rate: The highest that meets every SLO and that the device keeps up with; 0 where an SLO fails at any rate.
        saturation: The highest that the device keeps up with.
        limit: `SATURATION`, or the classes and bounds that fail just above: "ls: ttft".
        failing: The lowest rate that was found to fail an SLO; nan where none up to saturation does.
        runs: How many were simulated.
        cut: How many of them were ended early.
        warned: What the simulations warned of, message -> category.
    """

    rate: float
    saturation: float
    limit: str
    failing: float
    runs: int
    cut: int
    warned: dict[str, type[Warning]] = field(default_factory=dict)


def find(seeds: Sequence[Run], before: Sequence[Found] = (), cut: bool = True) -> Found:
    """Search the capacity of a policy, the requests of all `seeds` judged together.

    Args:
        seeds: A simulation of the sweep for each seed, with the same policy; the rate of its configuration is not used.
        before: What was found for each seed by itself: the search begins between these.
        cut: End runs that cannot meet an SLO any more; the rate is the same without.

    Raises:
        ConfigError, TraceError, TimingError, SchedulerError: As a simulation does.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _Search(seeds, cut).find(before)
    return replace(found, warned={str(one.message): one.category for one in caught})


class _Search:
    """One search under way."""

    def __init__(self, seeds: Sequence[Run], cut: bool):
        self.seeds, self.cut = seeds, cut
        self.config = seeds[0].config
        self.runs = self.ended = 0

    def find(self, before: Sequence[Found]) -> Found:
        served = [one.saturation for one in before] or [self.saturation(run) for run in self.seeds]
        saturation = len(served) / sum(1 / rate for rate in served)  # requests over seconds, of all seeds
        if self.meets(saturation):
            return self.found(saturation, saturation, math.nan)
        low, high = 0.0, saturation
        if before:
            high = min(saturation, max(one.rate if math.isnan(one.failing) else one.failing for one in before))
            low = min(one.rate for one in before)
        if not 0 < low < high or not self.meets(low):
            low, high = self.bracket(low if 0 < low < high else saturation)
        while low and high - low > self.config.capacity.precision * high:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.meets(middle) else (low, middle)
        return self.found(low, saturation, high)

    def found(self, rate: float, saturation: float, failing: float) -> Found:
        limit = SATURATION if math.isnan(failing) else self.reason(failing)
        return Found(rate, saturation, limit, failing, self.runs, self.ended)

    def bracket(self, failing: float) -> tuple[float, float]:
        """A rate that meets the SLOs, 0 if there is none, and one at most twice as high that does not."""
        for _ in range(HALVINGS):
            rate = failing / 2
            if not self.simulates(rate):
                break
            if self.meets(rate):
                return rate, failing
            failing = rate
        return 0.0, failing

    def simulates(self, rate: float) -> bool:
        """Whether a run at so low a rate ends before the clock's rounding counts, and has requests to judge by."""
        config = self.config
        if _grows(config):
            return rate * (config.duration or 0.0) >= _FEWEST
        return len(requests(self.seeds[0], rate)) / rate < LAST_ARRIVAL_S / 2

    def meets(self, rate: float) -> bool:
        """Whether every class meets its SLO at that rate."""
        return not self.failures(rate, self.cut)[0]

    def failures(self, rate: float, cut: bool) -> tuple[bool, Judge, dict[str, np.ndarray]]:
        """Whether a class fails, and the misses of all seeds by bound; only a lower bound where runs are cut."""
        traces = [requests(run, rate) for run in self.seeds]
        judges = [Judge(self.config, trace) for trace in traces]
        together, missed = np.sum([judge.sent for judge in judges], axis=0), np.zeros_like(judges[0].sent)
        misses: dict[str, np.ndarray] = {}
        failed = False
        for run, trace, judge in zip(self.seeds, traces, judges, strict=True):
            judge.together, judge.missed = together, missed
            result = self.simulated(run, rate, trace, judge if cut else None)
            mine = judge.misses(result)
            failed |= bool(judge.fails(mine[""]).any())
            missed = missed + mine[""]
            misses = {key: misses[key] + count if misses else count for key, count in mine.items()}
            if failed and cut:
                break
        return failed, judges[0], misses

    def reason(self, rate: float) -> str:
        """Which classes fail at a rate, and by which of their bounds, whole runs counted."""
        _, judge, misses = self.failures(rate, cut=False)
        told = []
        for cls in np.flatnonzero(judge.fails(misses[""])):
            of_class = {key: int(count[cls]) for key, count in misses.items() if key and count[cls]}
            failed = [key for key in of_class if judge.fails(misses[key])[cls]]
            worst = failed or [max(of_class, key=lambda key: of_class[key])]
            told.append(f"{judge.classes[cls]}: {', '.join(worst)}")
        return "; ".join(told)

    def saturation(self, run: Run) -> float:
        """Requests per second that the device serves where more are offered."""
        config = self.config
        if _grows(config):
            config = config.model_copy(update={"duration": None, "requests": _PROBE, "rate": 1.0})
        trace = request_trace(config, run.seed)
        at_once = self.served(run, replace(trace, arrival=np.zeros(len(trace))))
        return self.served(run, requests(run, _OVERLOAD * at_once))

    def served(self, run: Run, trace: RequestTrace) -> float:
        """Requests over the makespan, as many as were served of those that fit the memory."""
        result = simulate_run(run, trace)
        self.runs += 1
        finished = result.status == Status.FINISHED
        if not finished.any():
            raise ConfigError(
                f"{run}: no request is served: {next(iter(result.reasons.values()), 'all are turned away')}"
            )
        share = finished.sum() / fits(self.config, trace).sum()
        return float(len(trace) * share / (np.nanmax(result.finish) - trace.arrival[0]))

    def simulated(self, run: Run, rate: float, trace: RequestTrace, judge: Judge | None) -> RunResult:
        result = simulate_run(at_rate(run, rate), trace, stop=None if judge is None else judge.hopeless)
        self.runs += 1
        self.ended += bool((result.status == Status.UNFINISHED).any())
        return result


def _grows(config: Config) -> bool:
    """Whether a higher rate sends more requests, since they arrive for a given time."""
    return config.duration is not None and not isinstance(config.arrival, Replay)


def at_rate(run: Run, rate: float) -> Run:
    """`run` with another rate."""
    return replace(run, config=run.config.model_copy(update={"rate": rate}), cells={**run.cells, "rate": rate})


def requests(run: Run, rate: float) -> RequestTrace:
    """The requests of the run's seed at that rate."""
    return request_trace(at_rate(run, rate).config, run.seed)
