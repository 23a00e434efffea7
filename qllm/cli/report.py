"""qllm report: one HTML file for one or several results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders written by qllm simulate --out")],
    out: Annotated[
        Path | None, typer.Option(help="The file; default: report.html in the first folder", show_default=False)
    ] = None,
) -> None:
    """Put tables, figures and timelines of results into one HTML file, several results side by side."""
    from qllm.plots.report import write_report

    typer.echo(write_report(folders, out or folders[0] / "report.html"))
