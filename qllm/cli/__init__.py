"""The command line. Mistakes that a user can make end in one line on stderr and exit code 2."""

from __future__ import annotations

import errno
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import qllm.executor  # noqa: F401  # before anybody imports PyTorch: it sets how OpenMP's threads wait
from qllm.cli import calibrate as cli_calibrate
from qllm.cli import capacity as cli_capacity
from qllm.cli import config as cli_config
from qllm.cli import report as cli_report
from qllm.cli import run as cli_run
from qllm.cli import serve as cli_serve
from qllm.cli import simulate as cli_simulate
from qllm.cli import timings as cli_timings
from qllm.cli import trace as cli_trace
from qllm.cli import validate as cli_validate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate and serve Mixture-of-Experts models for latency-sensitive and best-effort jobs on one GPU.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from qllm._version import __version__

        typer.echo(f"qllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave")
    ] = False,
) -> None:
    """Options in front of a command."""


app.command("simulate")(cli_simulate.simulate)
app.command("run")(cli_run.run)
app.command("serve")(cli_serve.serve)
app.command("capacity")(cli_capacity.capacity)
app.command("report")(cli_report.report)
app.command("calibrate")(cli_calibrate.calibrate)
app.command("validate")(cli_validate.validate)
app.add_typer(cli_config.app, name="config")
app.add_typer(cli_trace.app, name="trace")
app.add_typer(cli_timings.app, name="timings")


def main() -> None:
    """Entry point of the `qllm` command."""
    warnings.showwarning = _one_line_warning
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe left; Python would complain at exit
        sys.exit(1)
    except Exception as error:
        if not _expected(error):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {escape(_one_line(error))}")
        sys.exit(2)


def _expected(error: Exception) -> bool:
    """Whether `error` is one of the typed errors for input from outside."""
    from qllm.errors import EXPECTED  # not before something went wrong: --help must stay quick

    long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG  # wherever the file is looked for
    return isinstance(error, EXPECTED) or long


def _one_line(error: Warning | Exception | str) -> str:
    return " ".join(str(error).split())


_warned: set[str] = set()


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    text = _one_line(message)
    if text not in _warned:  # reading a file warns in each process that reads it
        _warned.add(text)
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[yellow]warning:[/yellow] {escape(text)}")
