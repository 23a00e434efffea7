"""What the caption of a figure says besides where its step times come from."""

from __future__ import annotations

from collections.abc import Set

from qllm.config.schema import cells
from qllm.experiment.metrics import BOUNDS
from qllm.experiment.results import Results
from qllm.experiment.sweep import SEVERAL

_SAID = {
    "ttft": "TTFT at most {} s",
    "ttft_over_isolated": "TTFT at most {} x isolated",
    "tpot": "TPOT at most {} s",
    "e2e": "turnaround at most {} s",
}


def bounds_of(results: Results, cls: str) -> dict[str, list[float]]:
    """The bounds of a class by key of `Slo`: none, one, or those that were swept."""
    found = {key: {getattr(slo, key) for slo in results.slos[cls]} - {None} for key in BOUNDS}
    return {key: sorted(values) for key, values in found.items()}


def told(results: Results, key: str, value: object) -> str:
    """A swept value in a title; a timing trace with what its times are: "timings = h100.csv (imported)"."""
    if key != "timings":
        return f"{key} = {value}"
    lines = results.config.provenance.get("timings", "").split(SEVERAL)
    sources = dict(zip(cells(results.config.sweep[key]), lines, strict=False))
    source = sources.get(str(value), "").partition(": ")[2].partition(";")[0]
    return f"{key} = {value}" + (f" ({source})" if source else "")


def notes(results: Results, columns: Set[str], hollow: bool, parted: bool) -> list[str]:
    """Sentences on the signs of a figure of these columns of the summary; `hollow`, `parted`: signs that it has."""
    said = []
    for name in results.config.classes:
        bounds = [
            _SAID[key].format(" or ".join(f"{bound:g}" for bound in values))
            for key, values in bounds_of(results, name).items()
            if values
        ]
        if bounds:
            said.append(f"SLO of {name}: {', '.join(bounds)}.")
    seeds = results.requests["seed"].nunique()
    if seeds > 1:
        few = ": about from the lowest seed to the highest" if seeds < 4 else ""
        said.append(f"Bands: 95\u00a0%, bootstrap over {seeds} seeds{few}.")
    if "throughput_rps" in columns:
        said.append(
            "Throughput: finished requests of the class / makespan (first arrival to last finish of any class)."
        )
    if hollow:
        said.append("Saturated: the queue still grew when arrivals ended, so the value depends on the run's length.")
    if parted:
        said.append("Lines that coincide are drawn side by side.")
    rejected = int((results.counted["status"] == "rejected").sum())
    if rejected:
        said.append(f"{rejected} of {len(results.counted)} requests were rejected and have no times.")
        by_class = results.counted.loc[results.counted["status"] == "rejected", "class"].value_counts(sort=False)
        if len(results.config.classes) > 1:
            said.append(f"By class: {', '.join(f'{name} {count}' for name, count in by_class.items() if count)}.")
    warmup = results.config.warmup
    if warmup is not None:
        what = f"{warmup.share:.0%} of the requests" if warmup.seconds is None else f"{warmup.seconds:g} s"
        said.append(f"The first {what} of each run do not count.")
    return said
