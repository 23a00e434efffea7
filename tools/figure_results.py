"""Read the results files that pictures and tables of the documents are made from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def results_path(name: str) -> Path:
    """docs/results/NAME.json."""
    return ROOT / "docs" / "results" / f"{name}.json"


@cache
def load(name: str) -> dict[str, Any]:
    """The file's "provenance", a dict, and its tables, DataFrames."""
    read = json.loads(results_path(name).read_text(encoding="utf-8"))
    tables = {key: pd.DataFrame(**_named(value)) for key, value in read.items() if key != "provenance"}
    return {"provenance": read["provenance"], **tables}


def caption(name: str) -> str:
    """One line that says who says so: the source, the command and the day."""
    told = load(name)["provenance"]
    source = told["source"]
    return f"{source[0].upper()}{source[1:]} (`{told['command']}`, {told['date']})."


def _named(table: dict[str, Any]) -> dict[str, Any]:
    return {"data": table["rows"], "columns": table["columns"]}
