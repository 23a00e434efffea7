"""Results of a benchmark in a small JSON file, with where they come from; tools/figures.py draws from these files."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # most benchmarks bring rows of their own
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
UNTOLD = {"--out", "--results", "--jobs", "--json", "--logs"}  #: options that change no number
PACKAGES = ("qllm-moe", "numpy", "simpy", "torch", "transformers")


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Give `parser` the option --out, a file; `name`: of the file that the documents are drawn from."""
    told = f"write the numbers to this file, with where they come from; the documents use docs/results/{name}.json"
    parser.add_argument("--out", type=Path, metavar="FILE", help=told)


def this_machine() -> str:
    """The processor that a measurement ran on, and how many cores it has."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].strip() if names else model
    return f"{model}, {os.cpu_count()} cores"


def save(path: Path, *, source: str, tables: dict[str, pd.DataFrame | list[dict[str, Any]]], **facts: Any) -> None:
    """Write `tables` and their provenance to `path`.

    Args:
        path: the file; its folder is made if need be.
        source: "measured on ...", or "simulated on ..." and whether those step times are imported or modelled.
        tables: name -> rows. Numbers keep six digits; nan becomes null.
        facts: further lines of the provenance, such as `note`.
    """
    provenance = {
        "command": command(),
        "date": date.today().isoformat(),
        "source": source,
        "versions": versions(),
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(provenance, tables), encoding="utf-8")


def text(provenance: dict[str, Any], tables: dict[str, pd.DataFrame | list[dict[str, Any]]]) -> str:
    """The file's content: a line for each row, so that a change of one row is a change of one line."""
    parts = [f'"provenance": {json.dumps(provenance, indent=1, ensure_ascii=False)}']
    for name, given in tables.items():
        rows = given if isinstance(given, list) else given.to_dict("records")
        columns = list(rows[0])
        lines = [json.dumps([_plain(row[column]) for column in columns], ensure_ascii=False) for row in rows]
        listed = ",\n".join(lines)
        parts.append(f'"{name}": {{"columns": {json.dumps(columns)}, "rows": [\n{listed}\n]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def command(arguments: Sequence[str] | None = None) -> str:
    """The command line that runs now, without UNTOLD options and without folders of this machine."""
    words = list(sys.argv if arguments is None else arguments)
    script = Path(words[0]).resolve()
    told = [f"python {script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name}"]
    skip = False
    for word in words[1:]:
        if not skip and word not in UNTOLD:
            given = Path(word)
            told.append(given.name if given.is_absolute() else word)
        skip = word in UNTOLD
    return " ".join(told)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on, where they are loaded."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if name == "qllm-moe" or name in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found


def _plain(value: Any) -> Any:
    """A JSON value: six digits, null for nan."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    number = float(value)
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e9 else float(f"{number:.6g}")
