"""qllm run: the sweep of a YAML file on the real engine, to the same table, figures and files as qllm simulate."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from qllm.cli.options import ANY_SIZE, EXPERTS, FORCE, SET
from qllm.cli.table import Format, print_table, records


class GraphsChoice(StrEnum):
    """`qllm.executor.graphs.runner.GRAPHS`, here without loading PyTorch."""

    load = "load"
    use = "use"
    off = "off"


def run(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/demo_engine.yaml", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint: a folder or a model hub's name; default: a small random MoE made on the spot"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16")] = "auto",
    experts: Annotated[str, typer.Option(help=EXPERTS)] = "plain",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint")
    ] = False,
    graphs: Annotated[
        GraphsChoice, typer.Option(help="On a GPU: when short passes are recorded as CUDA graphs")
    ] = GraphsChoice.load,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: out/<name of the config>-engine")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE)] = False,
    any_size: Annotated[bool, typer.Option("--any-size", help=ANY_SIZE)] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Write timeline.json (for ui.perfetto.dev) and timeline.png too")
    ] = False,
    format: Annotated[Format, typer.Option(help="How to print the summary")] = Format.table,
) -> None:
    """Run a configuration on the real engine: the same requests and policies, measured on this machine."""
    from qllm.config.config import load_config
    from qllm.config.yaml_lines import ConfigError
    from qllm.experiment.folders import claim
    from qllm.experiment.progress import progress
    from qllm.experiment.run import runs
    from qllm.experiment.size import check_engine_size
    from qllm.plots.curves import save_figures
    from qllm.plots.perfetto import write_timeline
    from qllm.plots.schedule import save_timeline

    loaded = load_config(config, set_ or [])
    todo = runs(loaded)
    if not any_size:
        check_engine_size(todo)
    folder = claim(out or Path("out") / f"{loaded.name}-engine", loaded, "engine", force)
    missing = [name for name in ("torch", "transformers", "greenlet") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not installed; the engine needs: pip install 'qllm-moe[executor]'")
    with progress("loading the model") as update:
        from qllm.experiment import engine_run

        target = engine_run.load_target(model, device, dtype, trust_remote_code, experts)
        typer.echo(engine_run.describe(target), err=True)
        results, shown = engine_run.run(loaded, target, update, graphs.value)
        update.phase("drawing figures")
        results.save(folder)
        caption = engine_run.caption(target)
        save_figures(results, folder, caption)
        if timeline:
            write_timeline(shown, folder / "timeline.json", time="measured")
            save_timeline(shown, folder / "timeline.png", caption, target.layers)
    if format is Format.json:
        typer.echo(json.dumps(records(results), indent=2))
    else:
        print_table(results, caption, folder)
