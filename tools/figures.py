"""Redraw every picture and every table of numbers in README.md and docs/, from docs/results alone.

    python tools/figures.py [--check]

A table stands between two markers, `<!-- table: NAME -->` and `<!-- /table -->`; NAME is one of TABLES in
figure_parts/tables.py. A picture carries the hash of the results file that it was drawn from. `--check` changes
nothing, names what is out of date and fails where something is.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

from figure_parts.pictures import PICTURES
from figure_parts.results import ROOT, results_path
from figure_parts.tables import TABLES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

IMAGES = ROOT / "docs" / "img"
HASH_KEY = "Results"  #: of the PNG's text
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def documents() -> list[Path]:
    """README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """`text` with every marked table written anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def stamp(name: str) -> str:
    """What a picture of the results file `name` carries: the file and its hash."""
    return f"docs/results/{name}.json sha256:{hashlib.sha256(results_path(name).read_bytes()).hexdigest()}"


def carried(picture: Path) -> str:
    """The stamp in a PNG, empty where it has none."""
    with Image.open(picture) as image:
        return str(image.info.get(HASH_KEY, ""))


def stale() -> list[str]:
    """Documents and pictures that differ from what would be written now."""
    found = [str(path.relative_to(ROOT)) for path in documents() if with_tables(_read(path)) != _read(path)]
    for picture, (name, _) in PICTURES.items():
        path = IMAGES / picture
        if not path.exists() or carried(path) != stamp(name):
            found.append(f"docs/img/{picture}")
    return found


def write() -> None:
    """Write all tables, and draw all pictures."""
    for path in documents():
        path.write_text(with_tables(_read(path)), encoding="utf-8")
    for picture, (name, draw) in PICTURES.items():
        figure = draw(name)
        FigureCanvasAgg(figure)
        figure.savefig(IMAGES / picture, dpi=150, metadata={"Software": None, HASH_KEY: stamp(name)})


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is out of date")
    if not parser.parse_args().check:
        write()
    elif found := stale():
        sys.exit("out of date, run `make figures`: " + ", ".join(found))


if __name__ == "__main__":
    main()
