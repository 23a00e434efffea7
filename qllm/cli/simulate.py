"""qllm simulate: a sweep from a YAML file to a table, figures and files."""

from __future__ import annotations

import json
import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qllm.cli.options import ANY_SIZE, FORCE, SET
from qllm.cli.table import Format, print_failures, print_table, records


class Backend(StrEnum):
    """Where the simulations run (qllm.experiment.backends)."""

    local = "local"
    ray = "ray"
    dask = "dask"


def simulate(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/paper.yaml", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: out/<name of the config>")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; the results do not depend on it")] = os.cpu_count() or 1,
    backend: Annotated[
        Backend,
        typer.Option(help="Where they run: a Ray cluster (RAY_ADDRESS) or Dask cluster (DASK_SCHEDULER_ADDRESS) if so"),
    ] = Backend.local,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run all of the sweep again, also what an earlier run has finished")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE)] = False,
    any_size: Annotated[bool, typer.Option("--any-size", help=ANY_SIZE)] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline", help="Write timeline.json (for ui.perfetto.dev) and timeline.png too: the last point"
        ),
    ] = False,
    load: Annotated[
        bool,
        typer.Option(
            "--load",
            help="Write load.parquet and load.png too: utilisation, batch size, KV in use and queues over time, at the "
            "last point",
        ),
    ] = False,
    window: Annotated[
        float | None,
        typer.Option(help="Of --load: seconds that a row is a mean over; default: 1/200 of the longest run"),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the summary")] = Format.table,
) -> None:
    """Simulate what each policy does to TTFT, SLO attainment and throughput, at each point of a sweep."""
    from qllm.config.config import load_config
    from qllm.config.yaml_lines import ConfigError
    from qllm.experiment.cache import forget
    from qllm.experiment.folders import POINTS, claim
    from qllm.experiment.load import check_window, load_table, write_load
    from qllm.experiment.run import runs
    from qllm.experiment.size import check_size
    from qllm.experiment.sweep import differences, provenance
    from qllm.experiment.sweep import simulate as run_sweep
    from qllm.plots.curves import save_figures
    from qllm.plots.lines import most_urgent, titles
    from qllm.plots.load import save_load
    from qllm.plots.perfetto import record, timeline_runs, write_timeline
    from qllm.plots.schedule import save_timeline

    if window is not None and not load:
        raise ConfigError("--window: says how --load counts; allowed: with --load only")
    check_window(window)
    loaded = load_config(config, set_ or [])
    for changed in differences(loaded.provenance, provenance(loaded)):
        warnings.warn(f"{config}: {changed}; the results may differ", stacklevel=1)
    folder = claim(out or Path("out") / loaded.name, loaded, "simulation", force)  # before the work, not after it
    keep = folder / POINTS
    if fresh:
        if not any_size:
            check_size(todo := runs(loaded), todo, jobs)
        forget(keep)
    looked = any_size or fresh
    try:
        results = run_sweep(loaded, jobs=jobs, backend=backend.value, keep=keep, progress=True, any_size=looked)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is finished is kept in {keep}/: the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    results.save(folder)
    caption = f"Timings: {results.config.provenance['timings']}"
    save_figures(results, folder, caption)
    recorded = record(timeline_runs(loaded), load) if timeline or load else []
    if timeline:
        write_timeline(recorded, folder / "timeline.json")
        save_timeline(recorded, folder / "timeline.png", f"Simulated. {caption}")
    if load:
        table = load_table(recorded, window)
        write_load(table, folder)
        urgent = most_urgent(results) if len(loaded.classes) > 1 else ""
        save_load(table, folder / "load.png", f"Simulated. {caption}", titles(results), urgent)
    if format is Format.json:
        typer.echo(json.dumps(records(results), indent=2))
    else:
        print_table(results, caption, folder)
        print_failures(results)
    if not results.failures.empty:
        raise typer.Exit(1)
