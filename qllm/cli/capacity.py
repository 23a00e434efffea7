"""qllm capacity: the highest rate that each policy serves within the SLOs, and what it costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qllm.cli.options import ANY_SIZE, FORCE, SET
from qllm.cli.simulate import Backend
from qllm.cli.table import Format

if TYPE_CHECKING:
    from qllm.capacity.tables import Capacity


def capacity(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/long_prefill.yaml", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: out/<name of the config>-capacity")
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Look at this policy alone; may be given several times")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; the results do not depend on it")] = os.cpu_count() or 1,
    backend: Annotated[Backend, typer.Option(help="Where they run, as in qllm simulate")] = Backend.local,
    force: Annotated[bool, typer.Option("--force", help=FORCE)] = False,
    any_size: Annotated[bool, typer.Option("--any-size", help=ANY_SIZE)] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    format: Annotated[Format, typer.Option(help="How to print what was found")] = Format.table,
) -> None:
    """Find the highest rate at which every class meets its SLO, for each policy, and its cost.

    The search chooses the rates: a rate in the file, or a sweep of it, is not used. Other swept keys stay.
    """
    from qllm.capacity.capacity import find_capacity, load_for_capacity
    from qllm.experiment.folders import claim
    from qllm.plots.capacity import save_capacity
    from qllm.plots.style import origin

    loaded = load_for_capacity(config, set_ or [], policies or [])
    folder = claim(out or Path("out") / f"{loaded.name}-capacity", loaded, "capacity", force)
    try:
        found = find_capacity(loaded, jobs=jobs, backend=backend.value, progress=True, any_size=any_size)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing is kept", err=True)
        raise typer.Exit(130) from None
    found.save(folder)
    caption = origin(found.config.provenance["timings"])
    save_capacity(found, folder, caption)
    if format is Format.json:
        typer.echo(json.dumps(found.plain(), indent=2))
    else:
        _print(found, caption, folder)


def _print(found: Capacity, caption: str, folder: Path) -> None:
    """A row per policy, with its classes below; then how the policies differ, and what the table rests on."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    swept, priced = list(found.config.sweep), "cost_per_million_tokens" in found.capacity
    shared = bool((found.capacity["gpus"] > 1).any())
    for name in (*swept, "policy", "class"):
        table.add_column(escape(name), no_wrap=True)
    costs = ("cost per\nM output", "cost per\nM tokens") if priced else ()
    per_gpu = ("per GPU",) if shared else ()
    heads = ("capacity\nper s", *per_gpu, "95 %\ninterval", "satu-\nration", "output\ntokens/s", "tokens/s", "SLO\nmet")
    for name in (*heads, *costs):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fails above it", no_wrap=True)
    for row in found.capacity.to_dict("records"):
        low, high = row["rate_lo_rps"], row["rate_hi_rps"]
        cells = [*(str(row[key]) for key in swept), row["policy"], "(all)", _number(row["rate_rps"])]
        cells += [_number(row["rate_per_gpu_rps"])] if shared else []
        cells += ["-" if low != low else f"{_number(low)}-{_number(high)}", _number(row["saturation_rps"])]
        cells += [f"{row['output_tokens_per_s']:.0f}", f"{row['tokens_per_s']:.0f}", ""]
        cells += [_number(row[f"cost_per_million_{kind}"]) for kind in ("output_tokens", "tokens")] if priced else []
        table.add_row(*map(escape, [*cells, row["limit"]]))
        for one in _classes(found, row["policy"], [row[key] for key in swept]):
            cells = ["" for _ in swept] + ["", one["class"], _number(one["rate_rps"])] + ["" for _ in per_gpu]
            met = one["slo_attainment"]
            cells += ["", "", f"{one['output_tokens_per_s']:.0f}", "", "-" if met != met else f"{met:.1%}"]
            table.add_row(*map(escape, cells))
        table.add_section()
    console = Console()
    console.width = 1000  # a narrower one would cut the numbers
    console.print(table)
    for line in (*_told(found), caption, f"Results: {folder}/"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _classes(found: Capacity, policy: str, values: list[Any]) -> list[Any]:
    """The classes of a policy where the swept keys have these values."""
    rows = found.classes[found.classes["policy"] == policy]
    for key, value in zip(found.config.sweep, values, strict=True):
        rows = rows[rows[key] == value]
    return rows.to_dict("records")


def _told(found: Capacity) -> list[str]:
    """What the table rests on, and the differences between the best policy and the others."""
    from qllm.experiment.paired import ONE_SEED, in_words

    config = found.config
    asked = f"{config.capacity.attainment:.4g}"
    lines = [
        f"Capacity: the highest rate at which {asked} of each class with an SLO meet it and the device "
        "keeps up (saturation). Requests per second of all classes."
    ]
    if len(config.seed_list) == 1:
        return [*lines, ONE_SEED]
    rows = found.differences
    rows = rows[rows["metric"] == "rate_rps"]
    best = found.capacity.sort_values("rate_rps", kind="stable")["policy"].iloc[-1]
    for row in rows.to_dict("records") if not config.sweep else []:
        if best in (row["policy"], row["minus"]):
            sign = 1 if row["policy"] == best else -1
            other = row["minus"] if sign == 1 else row["policy"]
            low, high = sorted((sign * row["low"], sign * row["high"]))
            lines.append(f"{best} minus {other}: {in_words('rate_rps', sign * row['difference'], low, high)}")
    return lines


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3g}"
