"""Pictures and tables of numbers in the documents are those that tools/figures.py makes of docs/results now."""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import figures  # noqa: E402
from figure_parts.tables import TABLES  # noqa: E402

RESULTS = sorted((ROOT / "docs" / "results").iterdir())
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+~]?\d[\d.,]*( ?(%|x|ms|s|us|GB))?")
#: pictures of pages, which show no results, with the scripts that make them
SCREENSHOTS = {"server_page.png": "tools/server_page.py"}
#: tables of numbers that no results file holds: parameters with their sources, not results
PARAMETERS = {"| cost | value | from |"}


def tables(text: str) -> list[list[str]]:
    """The lines of each Markdown table."""
    return [found[0].splitlines() for found in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def share_of_numbers(table: list[str]) -> float:
    """The share of numbers among a table's cells, without its first column."""
    cells = [cell.strip() for row in table[2:] for cell in row.strip("|").split("|")[1:]]
    return sum(bool(NUMBER.fullmatch(cell)) for cell in cells) / max(len(cells), 1)


def test_nothing_is_older_than_its_results() -> None:
    assert figures.stale() == []


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_picture_and_table_has_a_source(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for link in PICTURE.findall(text):
        drawn = (path.parent / link).resolve()
        assert drawn.parent == figures.IMAGES, f"{link} is not in docs/img"
        assert drawn.name in {*figures.PICTURES, *SCREENSHOTS}, f"no script draws {link}"
    for table in tables(figures.MARKED.sub("", text)):
        assert table[0] in PARAMETERS or share_of_numbers(table) < 0.25, f"no script writes this table: {table[0]}"


def test_a_table_of_numbers_is_told_from_a_table_of_words() -> None:
    [numbers] = tables("| policy | mean | p99 |\n|---|---|---|\n| fcfs | 12.5 | +3.1 % |\n")
    [words] = tables("| metric | meaning |\n|---|---|\n| TTFT | first token - arrival |\n")
    assert (share_of_numbers(numbers), share_of_numbers(words)) == (1.0, 0.0)


def test_every_picture_and_table_is_shown() -> None:
    shown = "\n".join(path.read_text(encoding="utf-8") for path in figures.documents())
    assert {path.name for path in figures.IMAGES.iterdir()} == {*figures.PICTURES, *SCREENSHOTS}
    assert [name for name in (*figures.PICTURES, *SCREENSHOTS) if f"img/{name})" not in shown] == []
    assert [script for script in SCREENSHOTS.values() if f"`python {script}`" not in shown] == []
    assert set(TABLES) == {name for _, name, _ in figures.MARKED.findall(shown)}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_results_file_says_where_it_is_from(path: Path) -> None:
    read = json.loads(path.read_text(encoding="utf-8"))
    told = read["provenance"]
    program, script, *_ = told["command"].split()
    assert program == "python"
    assert (ROOT / script).is_file(), script
    assert date.fromisoformat(told["date"])
    assert re.match(r"measured on|simulated|computed", told["source"])
    if told["source"].startswith("simulated"):
        assert re.search(r"modelled|imported|measured|made-up|shipped", told["source"])
    assert "versions" in told or "printed" in told
    assert path.stat().st_size < 50_000
    for name, table in read.items():
        if name != "provenance":
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), name


def test_old_pictures_and_tables_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "paper.json"
    changed.write_bytes((ROOT / "docs" / "results" / "paper.json").read_bytes() + b"\n")
    kept = figures.results_path
    monkeypatch.setattr(figures, "results_path", lambda name: changed if name == "paper" else kept(name))
    assert figures.stale() == ["docs/img/ttft.png"]
    monkeypatch.setitem(TABLES, "headline", lambda: "| other |")
    assert "README.md" in figures.stale()
