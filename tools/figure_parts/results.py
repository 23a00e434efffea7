"""Read the results files that pictures and tables of the documents are made from."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]


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
    """One line that says who says so: the source, the command, the day, and the commit where that is an older one."""
    told = load(name)["provenance"]
    source = told["source"]
    of_old = re.search("commit .*", told.get("printed", ""))
    return f"{source[0].upper()}{source[1:]} (`{told['command']}`, {told['date']}{f', {of_old[0]}' if of_old else ''})."


def _named(table: dict[str, Any]) -> dict[str, Any]:
    return {"data": table["rows"], "columns": table["columns"]}
