"""How fast a machine was in a run, against its calibration: one number for small steps, one for large ones.

Small steps wait for memory and large ones for arithmetic, and what else happens on a host, or the clock of its cores,
changes the one without the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qllm.executor.calibration.grid import Cell
from qllm.sim import Pace
from qllm.traces.step_times.cost_model import PassCost, PassCostModel
from qllm.traces.step_times.drift import slowness_by_size, smooth

MOST_APART = 0.5  # of the speed of all passes
PACE_S = 1.0  # between two speeds that a simulation follows
APART_S = 1e6  # between runs, so that the visits of one say nothing about the speed in another


class Call(NamedTuple):
    """One real pass as the step model was asked for it: chunks (new tokens, cached before), decoding sequences, their
    cached tokens in all, sequences that get a token; what the model said; whether what ran before had prompts."""

    chunks: tuple[tuple[int, int], ...]
    n_decode: int
    decode_context: int
    rows: int
    cost: PassCost
    after_prefill: bool = False


class PassSeconds(NamedTuple):
    """One real pass: what it took and what is predicted. routing: tokens per expert, int[MoE layers, experts]."""

    call: Call
    measured: float
    predicted: float
    routing: np.ndarray


class Speed(NamedTuple):
    """What steps took over what is predicted, above 1 where the machine was slower: `few` for those of up to `bound`
    tokens (or sequences), and what belongs to no size; `many` for larger ones."""

    few: float
    many: float
    bound: int


class Visited(NamedTuple):
    """A visit of a calibration in a run: at what time of it (seconds), to which kind of pass, which took `seconds`."""

    at: float
    cell: Cell
    seconds: float


class Slowed(NamedTuple):
    """How much longer passes took at `at` (seconds of a run) than on average: `small` ones, or larger."""

    at: float
    small: bool
    slow: float


def speed_of(passes: list[PassSeconds], steps: PassCostModel, bound: int) -> Speed:
    """The speed at which the decoding passes take together what they took, and so do those with prompts. `bound`: most
    sequences that decode together. Where one kind is missing, both numbers stay close to what is known; where one would
    lie further than MOST_APART from what all passes together took, both are that: the sizes cannot be told apart."""
    larger = PassCostModel(steps.timings.scaled(1.0, 2.0, bound), expert_mode=steps.mode)
    plain = PassCostModel(steps.timings, expert_mode=steps.mode)
    sums = np.zeros((2, 3))  # decoding only, with prompts; few, many, measured
    for p in passes:
        many = seconds_by(larger, p) - seconds_by(plain, p)
        sums[int(bool(p.call.chunks))] += (p.predicted - many, many, p.measured)
    whole = sums[:, 2].sum() / max(sums[:, :2].sum(), 1e-12)
    # From what one number for all explains, the shortest way to what two explain: numpy's solution of least norm.
    change = np.linalg.lstsq(sums[:, :2], sums[:, 2] - whole * sums[:, :2].sum(axis=1), rcond=1e-9)[0]
    if max(abs(change)) > MOST_APART * whole:
        change = np.zeros(2)
    return Speed(float(whole + change[0]), float(whole + change[1]), bound)


def at_speed(steps: PassCostModel, speed: Speed) -> PassCostModel:
    """`steps` on that machine, cut about as they were."""
    timings = steps.timings.scaled(*speed)
    return PassCostModel(timings, max_step=steps.max_step * speed.many, expert_mode=steps.mode)


def slowed_in(runs: Sequence[Sequence[Visited]], bound: int) -> list[list[Slowed]]:
    """How slow the machine was at each visit of each run, by the visits around it (`qllm.traces.step_times.drift`),
    against the average visit of all runs to its kind of pass: for itself for passes of up to `bound` tokens and for
    larger ones."""
    visits = [(run, visit) for run, mine in enumerate(runs) for visit in mine]
    at = np.array([run * APART_S + visit.at for run, visit in visits])
    small = np.array([visit.cell.tokens <= bound for _, visit in visits], dtype=bool)
    seconds = np.array([visit.seconds for _, visit in visits])
    slow = slowness_by_size(at, [visit.cell for _, visit in visits], seconds, small)
    found: list[list[Slowed]] = [[] for _ in runs]
    for (run, visit), one, value in zip(visits, small.tolist(), slow.tolist(), strict=True):
        found[run].append(Slowed(visit.at, one, value))
    return found


def mean_speed(visits: list[Slowed], bound: int) -> Speed:
    """The machine's average speed in a run."""
    few, many = ([v.slow for v in visits if v.small == small] for small in (True, False))
    return Speed(float(np.mean(few or 1.0)), float(np.mean(many or 1.0)), bound)


def pace_of(visits: list[Slowed], steps: PassCostModel, bound: int) -> Pace:
    """`steps`, which are those of the average visit, at the speed that the machine had when a pass begins, for itself
    for small steps and for large ones, by the visits around that time. Nothing comes from the run's own passes."""
    at = np.array([visit.at for visit in visits])
    times = np.arange(at.min(), at.max() + PACE_S, PACE_S)
    curves = []
    for small in (True, False):
        mine = np.array([(v.at, v.slow) for v in visits if v.small == small]).reshape(-1, 2)
        curves.append(smooth(mine[:, 0], mine[:, 1], times) if len(mine) else np.ones(len(times)))
    models = [at_speed(steps, Speed(float(few), float(many), bound)) for few, many in zip(*curves, strict=True)]

    def pace(now: float) -> PassCostModel:
        return models[min(max(0, round((now - times[0]) / PACE_S)), len(models) - 1)]

    return pace


def seconds_by(steps: PassCostModel, p: PassSeconds) -> float:
    """What `steps` predicts for the pass, cut as `steps` cuts it."""
    cost = cost_of_call(steps, p.call)
    return steps.total(cost, steps.experts_of_pass(cost, p.routing))


def cost_of_call(steps: PassCostModel, call: Call) -> PassCost:
    """How `steps` cuts that pass, and what it takes but for its experts."""
    return steps.cost(
        [(None, *chunk) for chunk in call.chunks],
        call.n_decode,
        call.decode_context,
        call.rows,
        after_prefill=call.after_prefill,
    )
