"""qllm config: what a configuration may say."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qllm.cli.table import Format

app = typer.Typer(no_args_is_help=True, help="What a configuration may say.")


@app.command()
def keys(
    begins: Annotated[str, typer.Argument(help="Only keys that begin so, e.g. limits", show_default=False)] = "",
    format: Annotated[Format, typer.Option(help="How to print them")] = Format.table,
) -> None:
    """Print every key of a configuration, what it may be, its default and what it is for."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qllm.config.keys import config_keys
    from qllm.config.yaml_lines import ConfigError
    from qllm.traces.messages import suggestion

    every = config_keys()
    found = [key for key in every if key.name.startswith(begins)]
    if not found:
        raise ConfigError(
            f"{begins}: no key begins so; {suggestion(begins, dict.fromkeys(k.name.split('.')[0] for k in every))}"
        )
    if format is Format.json:
        typer.echo(json.dumps([key._asdict() for key in found], indent=2))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, fold in (("key", False), ("allowed", True), ("default", True), ("what it is", True)):
        table.add_column(name, no_wrap=not fold, overflow="fold")
    for key in found:
        table.add_row(*(Text(cell) for cell in key))
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
