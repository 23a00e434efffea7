"""The schedule of simulated runs as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

A process per run (a policy at a point of the sweep), a track per priority with the names of its classes (a pass belongs
to the most urgent in it), a slice per stretch that a pass ran. "preempted" and "resumed" markers name layer (and
stage); an arrow joins the two. Format: "Trace Event Format", JSON object form; times in microseconds.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qllm.config.config import Config
from qllm.config.workload import request_trace
from qllm.errors import EXPECTED
from qllm.experiment.run import Run, runs, simulate_run
from qllm.sim import PassSlice, RunResult


def timeline_runs(config: Config) -> list[Run]:
    """What a timeline shows: every policy at the last point of the sweep, with the first seed."""
    last = config.points()[-1]
    return [run for run in runs(config) if run.point == last and run.seed == config.seed_list[0]]


def record(shown: list[Run], load: bool = False) -> list[tuple[Run, RunResult]]:
    """Simulate again and record the passes, and the load, without the runs that fail (the sweep has said so)."""
    recorded = []
    for run in shown:
        with suppress(*EXPECTED):
            recorded.append((run, simulate_run(run, request_trace(run.config, run.seed), timeline=True, load=load)))
    return recorded


def class_names(config: Config) -> dict[int, str]:
    """The classes of each priority, which passes do not tell apart: "agent, evaluation"."""
    names: dict[int, list[str]] = {}
    for cls, job in config.classes.items():
        names.setdefault(job.priority, []).append(cls)
    return {priority: ", ".join(classes) for priority, classes in names.items()}


def write_timeline(recorded: list[tuple[Run, RunResult]], path: str | Path, time: str = "simulated") -> int:
    """Write what `record` gave to `path`, and return the number of events; `time`: simulated or measured."""
    events: list[dict[str, Any]] = []
    process = 0
    for run, result in recorded:
        for replica in range(run.config.replicas):
            process += 1
            name = str(run) if run.config.replicas == 1 else f"{run}, GPU {replica}"
            mine = [one for one in result.slices or [] if one.replica == replica]
            events += trace_events(mine, run.config, process, name)
    data = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"time": time}}
    Path(path).write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
    return len(events)


def trace_events(slices: list[PassSlice], config: Config, process: int = 1, name: str = "GPU") -> list[dict[str, Any]]:
    """The events of one run: metadata, then for each slice its own and the markers at its ends."""
    tracks = class_names(config)
    common = {"pid": process, "cat": "pass"}
    events: list[dict[str, Any]] = [{**common, "ph": "M", "name": "process_name", "args": {"name": name}}]
    # Perfetto takes a thread id of 0 for none at all, so tracks count from 1.
    tids = {priority: tid for tid, priority in enumerate(sorted({one.priority for one in slices}), start=1)}
    for priority, tid in tids.items():
        track, order = {"name": tracks.get(priority, f"priority {priority}")}, {"sort_index": priority}
        events.append({**common, "ph": "M", "tid": tid, "name": "thread_name", "args": track})
        events.append({**common, "ph": "M", "tid": tid, "name": "thread_sort_index", "args": order})
    suspended: set[int] = set()
    for one in slices:
        on_track = {**common, "tid": tids[one.priority]}
        # Perfetto rounds a start and a duration to whole nanoseconds each for itself: rounded here, both at the ends,
        # a slice cannot reach a nanosecond into the next one.
        start, end = (round(at * 1e9) for at in (one.start, one.end))
        flow = process << 32 | one.pass_id  # ids of flows must be whole numbers
        events.append(
            {
                **on_track,
                "ph": "X",
                "name": _name(one),
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "args": {
                    **{"pass": one.pass_id, "tokens": one.tokens},
                    **{"prefills": one.prefills, "decodes": one.decodes},
                    **{"from layer": one.first_layer, "to layer": one.layer},
                },
            }
        )
        if one.pass_id in suspended:
            suspended.discard(one.pass_id)
            resumed = {"pass": one.pass_id, "layer": one.first_layer}
            name = f"resumed in layer {one.first_layer}"
            events.append({**on_track, "ph": "i", "s": "t", "name": name, "ts": start / 1e3, "args": resumed})
            arrow = {**on_track, "id": flow, "name": "suspended"}
            events.append({**arrow, "ph": "f", "bp": "e", "ts": start / 1e3})
        if one.suspended:
            suspended.add(one.pass_id)
            stopped = {"pass": one.pass_id, "layer": one.layer, "stage": one.stage}
            name = f"preempted in layer {one.layer}, {one.stage}"
            events.append({**on_track, "ph": "i", "s": "t", "name": name, "ts": end / 1e3, "args": stopped})
            arrow = {**on_track, "id": flow, "name": "suspended"}
            events.append({**arrow, "ph": "s", "ts": end / 1e3})
    return events


def _name(one: PassSlice) -> str:
    parts = [f"{one.prefills} prefill"] * bool(one.prefills) + [f"{one.decodes} decode"] * bool(one.decodes)
    return " + ".join(parts)
