"""The report: one HTML file with the tables and figures of one or several results, which opens without a network."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from qllm.config.yaml_lines import ConfigError
from qllm.experiment.metrics import totals
from qllm.experiment.paired import ONE_SEED, in_words, paired_rows
from qllm.experiment.results import CONFIG, Results, load_results, portable
from qllm.experiment.sweep import SEVERAL
from qllm.plots.curves import save_figures
from qllm.plots.lines import titles
from qllm.plots.style import origin

#: What the source of a timing trace means for the numbers that follow from it.
EXPLAINED = {
    "measured": "Simulated on step times that were measured on this device.",
    "imported": "Simulated on kernel times that others measured and published; nothing here was measured.",
    "real": "Measured on the real engine; nothing here was simulated.",
    "modelled": "Simulated on modelled step times; nothing here was measured.",
}
#: Columns of the side-by-side table.
COMPARED = ("ttft_mean_s", "ttft_p99_s", "slo_attainment", "turnaround_mean_s", "throughput_rps", "saturated")
_FIGURES = (
    {"name": "ttft", "title": "TTFT"},
    {"name": "throughput", "title": "Turnaround and throughput"},
    {"name": "slo", "title": "SLO attainment"},
)
MOST_PAIRS = 6000  #: rows of a table of differences; of more, those from the first policy alone
_MIME = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and what it is sorted by (empty: undefined, always last)."""

    shown: str
    value: str


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report on folders of results to `out`, the same bytes for the same results. Raises ConfigError."""
    loaded = [load_results(folder) for folder in folders]
    labels = _labels([Path(folder) for folder in folders])
    policies = list(dict.fromkeys(chain.from_iterable(titles(results) for results in loaded)))  # one colour each
    parts = [
        _part(label, Path(folder), results, policies)
        for label, folder, results in zip(labels, folders, loaded, strict=True)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qllm.plots", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("report.html.j2").render(
        title=f"QLLM: {', '.join(dict.fromkeys(part['name'] for part in parts))}",
        parts=parts,
        example=f"{next(iter(loaded[0].config.classes))} {policies[-1]}",
        figure_kinds=[kind for kind in _FIGURES if any(part["figures"][kind["name"]] for part in parts)],
        differences=differences(loaded),
        compared=_table(compare(loaded, labels)),
        between=between(loaded, labels),
    )
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written: {error.strerror or error}") from None
    return path


def differences(loaded: Sequence[Results]) -> list[tuple[str, list[str]]]:
    """The keys of the configurations that are not the same in all: (dotted key, its value in each, '-' for none)."""
    plain = [results.config.model_dump(exclude_none=True, by_alias=True) for results in loaded]
    flat = [_flat(portable(one, Path.cwd())) for one in plain]
    keys = list(dict.fromkeys(chain.from_iterable(flat)))
    rows = [(key, [values.get(key, "-") for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def compare(loaded: Sequence[Results], labels: Sequence[str]) -> pd.DataFrame:
    """A row per policy, point, class and common swept key, with `COMPARED` of each result: columns 'ttft_p99_s: A'."""
    swept = [set(results.config.sweep) - {"rate"} for results in loaded]
    at = ["policy", "rate", "class", *sorted(set.intersection(*swept))]
    tables = []
    for results, label in zip(loaded, labels, strict=True):
        summary = results.summary[[*at, *COMPARED]].assign(policy=results.summary["policy"].astype(str))
        # several rows where this one swept a key that others did not: none of them is the counterpart
        tables.append(summary.drop_duplicates(at, keep=False).set_index(at).add_suffix(f": {label}"))
    joined = pd.concat(tables, axis=1, sort=False)
    several = sum(joined.index.isin(table.index).astype(int) for table in tables) > 1
    columns = [f"{metric}: {label}" for metric in COMPARED for label in labels]
    return joined[several][columns].reset_index()


def between(loaded: Sequence[Results], labels: Sequence[str]) -> dict[str, Any]:
    """The same policy in every two results on common seeds, if these stand for the same requests: rows, and a note."""
    if len({repr(_workload(results)) for results in loaded}) > 1:
        return {**_table(pd.DataFrame()), "note": "The workloads differ, so that seeds do not pair: no intervals."}
    swept = [set(results.config.sweep) - {"rate"} for results in loaded]
    at = ["policy", "rate", "class", *sorted(set.intersection(*swept))]
    tables = []
    for results, label in zip(loaded, labels, strict=True):
        table = results.per_seed.assign(result=label)
        tables.append(table.assign(policy=table["policy"].astype(str)).drop_duplicates([*at, "seed"], keep=False))
    return _differences(paired_rows(pd.concat(tables), "result", labels, at), "result")


def _workload(results: Results) -> Any:
    """What decides which requests a seed stands for."""
    config = results.config.model_dump(include={"classes", "arrival", "requests", "duration"})
    judged = ("slo", "deadline", "priority")
    config["classes"] = {
        name: {key: value for key, value in job.items() if key not in judged} for name, job in config["classes"].items()
    }
    return portable(config, Path.cwd())


def _differences(rows: pd.DataFrame, by: str) -> dict[str, Any]:
    """A table of differences with a column in words, and what has to be said of it."""
    if not len(rows) or rows["seeds"].max() < 2:
        return {**_table(rows[:0]), "note": ONE_SEED if len(rows) else ""}
    note = ""
    if len(rows) > MOST_PAIRS:
        first = rows["minus"].iloc[0]
        rows = rows[rows["minus"] == first][:MOST_PAIRS]
        note = f"Only differences from {first}, and at most {MOST_PAIRS} rows; differences.csv has all."
    words = [in_words(*row) for row in rows[["metric", "difference", "low", "high"]].itertuples(index=False)]
    clear = np.where((rows["low"] > 0) | (rows["high"] < 0), "yes", "")
    shown = rows.assign(**{by: rows[by] + " minus " + rows["minus"]}, words=words, clear=clear)
    names = {"words": "difference [95 % interval]", "clear": "leaves out 0"}
    last = ["words", "clear", "difference", "low", "high", "seeds"]
    order = [*(name for name in rows.columns if name not in ("minus", *last)), *last]
    return {**_table(shown[order].rename(columns=names)), "note": note}


def _part(label: str, folder: Path, results: Results, policies: Sequence[str]) -> dict[str, Any]:
    """What the template shows of one folder."""
    timings = results.config.provenance.get("timings", "unknown: unknown")
    sources = [(one.partition(": ")[2].partition(";")[0], one) for one in timings.split(SEVERAL)]
    with tempfile.TemporaryDirectory() as scratch:
        save_figures(results, scratch, origin(timings), policies)
        figures = {kind["name"]: _data(Path(scratch) / f"{kind['name']}.svg") for kind in _FIGURES}
    return {
        "label": label,
        "name": results.config.name,
        "sources": [
            {
                "name": source,
                "explained": EXPLAINED.get(source, "Where the step times come from is not known."),
                "timings": one,
            }
            for source, one in sources
        ],
        "figures": figures,
        "timeline": _data(folder / "timeline.png"),
        "load": _data(folder / "load.png"),
        "summary": _table(results.summary.drop(columns=["ttft_mean_lo_s", "ttft_mean_hi_s"])),
        "totals": _totals(results),
        "differences": _differences(results.differences, "policy"),
        "failures": _table(results.failures),
        "config": (folder / CONFIG).read_text(encoding="utf-8"),
    }


def _totals(results: Results) -> dict[str, Any]:
    """The sums over the classes, without the columns that have none; no rows where there is one class."""
    found = totals(results.summary).dropna(axis="columns", how="all")
    return _table(found if len(results.config.classes) > 1 else found[:0])


def _table(data: pd.DataFrame) -> dict[str, Any]:
    """Columns and rows of a table for the template."""
    types = data.dtypes
    text = [pd.api.types.is_bool_dtype(kind) or not pd.api.types.is_numeric_dtype(kind) for kind in types]
    columns = [{"name": str(name), "text": is_text} for name, is_text in zip(data.columns, text, strict=True)]
    return {"columns": columns, "rows": [[_cell(v) for v in row] for row in data.itertuples(index=False)]}


def _cell(value: Any) -> Cell:
    if isinstance(value, bool | np.bool_):
        return Cell("yes", "yes") if value else Cell("no", "no")
    if isinstance(value, float):
        return Cell("-", "") if value != value else Cell(f"{value:.4g}", repr(value))
    return Cell(str(value), str(value))


def _labels(folders: list[Path]) -> list[str]:
    """A short name for each folder: the last part of its path, or as much of the path as tells them apart."""
    absolute = [Path(os.path.abspath(folder)) for folder in folders]
    for parts in range(1, max(len(path.parts) for path in absolute)):
        labels = [str(Path(*path.parts[-parts:])) for path in absolute]
        if len(set(labels)) == len(labels):
            return labels
    raise ConfigError(f"{folders[0]}: a folder is given twice; allowed: different ones")


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """{'limits.max_seqs': '32', ...}; a list of plain values is one entry."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {key: str(value)}
    flat: dict[str, str] = {}
    for name, item in items:
        flat |= _flat(item, f"{key}.{name}" if key else str(name))
    return flat


def _data(path: Path) -> str:
    """The file as a data: address; empty where there is none."""
    if not path.is_file():
        return ""
    return f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
