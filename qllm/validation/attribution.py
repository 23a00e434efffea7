"""Where a simulation and the real engine part: kinds of passes, and the time between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pandas as pd

from qllm.traces.results import RunResult
from qllm.validation.validate import Comparison, EngineRun, PassCall


def by_pass(compared: list[Comparison]) -> pd.DataFrame:
    """Seconds of the real runs by kind of pass (prefill, decode, mixed) and between passes, largest error first.

    Columns count, measured_s, predicted_s (the same passes and routing), error_s, share of all measured time.
    """
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for one in compared:
        for kind, measured, predicted in (*_passes(one.real), *_between(one.real)):
            row = rows[kind]
            row[0], row[1], row[2] = row[0] + 1, row[1] + measured, row[2] + predicted
    table = pd.DataFrame(
        [(kind, int(count), measured, predicted) for kind, (count, measured, predicted) in rows.items()],
        columns=["kind", "count", "measured_s", "predicted_s"],
    )
    table["error_s"] = table["predicted_s"] - table["measured_s"]
    table["share"] = table["error_s"] / max(table["measured_s"].sum(), 1e-12)
    return table.sort_values("error_s", key=abs, ascending=False, ignore_index=True)


def _passes(real: EngineRun) -> Iterator[tuple[str, float, float]]:
    """(kind, seconds measured, seconds predicted) of each pass, without what lies between two passes."""
    steps, rested = real.steps, after_rest(real.result)
    between_s = steps.timings.engine_between_s or 0.0  # part of host_s, and so of each pass's prologue
    took: dict[int, float] = defaultdict(float)
    for s in real.result.slices or []:
        took[s.pass_id] += s.end - s.start
    for (id, seconds), call, counts in zip(sorted(took.items()), real.calls, real.result.routing or [], strict=True):
        predicted = steps.total(call.cost, steps.experts_of_pass(call.cost, counts)) + steps.wake_s * (id in rested)
        yield _kind(call), seconds, predicted - between_s


def _kind(call: PassCall) -> str:
    if call.prompt_tokens and call.n_decode:
        return "mixed passes"
    return "prefill passes" if call.prompt_tokens else "decode passes"


def _between(real: EngineRun) -> Iterator[tuple[str, float, float]]:
    """The same of each stretch between two passes that is no idle time."""
    steps, rested = real.steps, after_rest(real.result)
    for before, after in pairwise(real.result.slices or []):
        resumed = after.first > 0
        if after.pass_id in rested and not resumed:
            continue
        kind = "suspending and resuming" if before.suspended or resumed else "between passes"
        switched = steps.suspend_s * before.suspended + steps.resume_s * resumed
        yield kind, after.start - before.end, switched + (steps.timings.engine_between_s or 0.0)


def after_rest(result: RunResult) -> set[int]:
    """Ids of the passes before which nobody was in the system."""
    found, end = set(), 0.0
    for s in result.slices or []:
        if not np.any((result.arrival <= end) & (result.finish > s.start)):
            found.add(s.pass_id)
        end = s.end
    return found
