"""qllm simulate: a sweep from a YAML file to a table, figures and files."""

from __future__ import annotations

import json
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qllm.experiment.results import Results


class Backend(StrEnum):
    """Where the simulations run (qllm.backends)."""

    local = "local"
    ray = "ray"
    dask = "dask"


class Format(StrEnum):
    """How the summary is printed."""

    table = "table"
    json = "json"


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
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. sweep.rate=[1,2,4]")
    ] = None,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline", help="Write timeline.json (for ui.perfetto.dev) and timeline.png too: the last point"
        ),
    ] = False,
    format: Annotated[Format, typer.Option(help="How to print the summary")] = Format.table,
) -> None:
    """Simulate what each policy does to TTFT, SLO attainment and throughput, at each point of a sweep."""
    from qllm.config.config import load_config
    from qllm.experiment.cache import forget
    from qllm.experiment.results import make_folder
    from qllm.experiment.sweep import differences, provenance
    from qllm.experiment.sweep import simulate as run_sweep
    from qllm.plots.curves import save_figures
    from qllm.plots.perfetto import record, timeline_runs, write_timeline
    from qllm.plots.schedule import save_timeline

    loaded = load_config(config, set_ or [])
    for changed in differences(loaded.provenance, provenance(loaded)):
        warnings.warn(f"{config}: {changed}; the results may differ", stacklevel=1)
    folder = make_folder(out or Path("out") / loaded.name)  # before the work, not after it
    keep = folder / "points"
    if fresh:
        forget(keep)
    try:
        shown = format is Format.table and sys.stderr.isatty()
        results = run_sweep(loaded, jobs=jobs, backend=backend.value, keep=keep, progress=shown)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is finished is kept in {keep}/: the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    results.save(folder)
    caption = f"Timings: {results.config.provenance['timings']}"
    save_figures(results, folder, caption)
    if timeline:
        recorded = record(timeline_runs(loaded))
        write_timeline(recorded, folder / "timeline.json")
        save_timeline(recorded, folder / "timeline.png", f"Simulated. {caption}")
    if format is Format.json:
        typer.echo(json.dumps(records(results), indent=2))
    else:
        print_table(results, caption, folder)
        _print_failures(results)
    if not results.failures.empty:
        raise typer.Exit(1)


def records(results: Results) -> list[dict[str, Any]]:
    """The summary's rows as plain data; what is undefined becomes null."""
    rows = results.summary.astype(object).where(results.summary.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


#: Columns of the printed table: header, column of the summary, digits.
_PRINTED = (
    ("TTFT\nmean s", "ttft_mean_s", ".3f"),
    ("TTFT\np99 s", "ttft_p99_s", ".3f"),
    ("p99 /\nalone", "ttft_over_isolated_p99", ".1f"),
    ("blocking\np99 ms", "blocking_p99_s", ".1f"),
    ("TPOT\nms", "tpot_mean_s", ".0f"),
    ("turn-\naround s", "turnaround_mean_s", ".1f"),
    ("SLO\nmet", "slo_attainment", ".1%"),
    ("done\nper s", "throughput_rps", ".2f"),
    ("preempted\ntimes", "preemptions", "d"),
)
_WIDTH = 110  #: columns that the table needs


def print_table(results: Results, caption: str, folder: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    others = [key for key in results.config.sweep if key != "rate"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("rate", *others, "class", "policy", *(header for header, _, _ in _PRINTED)):
        table.add_column(name, justify="left" if name in ("class", "policy") else "right", no_wrap=True)
    order = {name: position for position, name in enumerate(results.config.classes)}
    ordered = results.summary.sort_values(["rate", *others], kind="stable")
    previous: Any = None
    for _, rows in ordered.groupby(["rate", *others], sort=False, dropna=False):
        for _, row in rows.sort_values("class", key=lambda names: names.map(order), kind="stable").iterrows():
            key = (row["rate"], *(row[o] for o in others), row["class"])
            if previous is not None and previous != key:
                table.add_section()
            previous = key
            table.add_row(
                f"{row['rate']:g}",
                *(str(row[other]) for other in others),
                str(row["class"]),
                str(row["policy"]),
                *(_cell(row[column], digits, header) for header, column, digits in _PRINTED),
            )
    console = Console()
    console.width = max(console.width, _WIDTH + 16 * len(others))  # a narrower one would cut the numbers
    console.print(table)
    console.print(f"{caption}\nResults: {folder}/", highlight=False, markup=False, soft_wrap=True)


def _print_failures(results: Results) -> None:
    """What failed, if anything, and why."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if results.failures.empty:
        return
    table = Table(box=SIMPLE_HEAD, title="Failed, and not in the results", title_justify="left")
    for name in results.failures.columns:
        table.add_column(str(name), overflow="fold")
    for row in results.failures.itertuples(index=False):
        table.add_row(*(escape(str(value)) for value in row))
    Console().print(table)


def _cell(value: Any, digits: str, header: str) -> str:
    if value != value:  # nan
        return "-"
    return format(value * 1000 if header.endswith("ms") else value, digits)
