"""qllm timings: what a timing trace holds and where it comes from; import of published measurements."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qllm.config.yaml_lines import ConfigError
from qllm.traces import import_defaults as defaults
from qllm.traces.messages import suggestion

app = typer.Typer(no_args_is_help=True, help="Timing traces: what they hold, where they come from.")


@app.command()
def describe(
    file: Annotated[str | None, typer.Argument(help="Timing trace or bundled name; default: list the bundled")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Device, model, source, licence and measured ranges of a timing trace, and what of it is not plausible."""
    from qllm.traces.step_times.timings import Timings, TimingWarning, bundled_timings

    if file is None:
        told = {name: Timings.load(name) for name in bundled_timings()}
        if as_json:
            typer.echo(json.dumps(list(told)))
        for name, timings in ({} if as_json else told).items():
            typer.echo(f"{name:<32} {timings.source:<9} {timings.device}; {timings.dtype}")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TimingWarning)  # they stand in what is printed
        described = Timings.load(file).describe()
    if as_json:
        typer.echo(json.dumps(described, indent=2, default=str))
        return
    steps, implausible = described.pop("steps"), described.pop("implausible")
    del described["least_s"]  # the last column of the table
    described["conditions"] = {key: text for key, text in described["conditions"].items() if key != "implausible"}
    for key, value in described.items():
        if isinstance(value, dict):
            typer.echo(f"{key}")
            for name, text in value.items():
                typer.echo(f"  {name}: {text}")
        else:
            typer.echo(f"{key:<20} {value if value is not None else 'not stated'}")
    typer.echo(f"\n{'step':<18} {'from':>16} {'to':>20} {'x roofline':>14}  points")
    for step, row in steps.items():
        points = ", ".join(f"{count} {source}" for source, count in row["points"].items())
        times = "-" if row["times_least"] is None else "{:.3g} to {:.3g}".format(*row["times_least"])
        typer.echo(f"{step:<18} {_size(row['lowest']):>16} {_size(row['highest']):>20} {times:>14}  {points}")
    for line in implausible:
        typer.echo(f"implausible: {line}")


@app.command("import")
def import_(
    out: Annotated[Path, typer.Argument(help="Timing trace to write (.csv)", show_default=False)],
    model: Annotated[str, typer.Option(help="Name of a known shape, or YAML '{name: ..., layers: ..., ...}'")],
    source: Annotated[
        str, typer.Option(help="aiconfigurator-core (the installed package) or a folder of its parquet files")
    ] = defaults.SOURCE,
    gpu: Annotated[str, typer.Option(help="GPU as the tables spell it, e.g. a100_sxm, h100_sxm")] = defaults.GPU,
    moe: Annotated[str, typer.Option(help="Whose MoE kernels: FRAMEWORK[:VERSION[:KERNEL]]")] = defaults.KERNELS,
    moe_dtype: Annotated[
        str, typer.Option(help="As the tables spell it: bfloat16, int4_wo, ...")
    ] = defaults.KERNEL_DTYPE,
    dense: Annotated[str, typer.Option(help="Whose GEMM kernels")] = defaults.KERNELS,
    gemm_dtype: Annotated[str, typer.Option(help="As the tables spell it")] = defaults.KERNEL_DTYPE,
    attention: Annotated[str, typer.Option(help="Whose attention kernels")] = defaults.KERNELS,
    expert_weights: Annotated[
        str | None,
        typer.Option(help="bf16, fp8, int4, mxfp4, ...: the experts' size in memory; default: by --moe-dtype"),
    ] = None,
    other_weights: Annotated[
        str | None, typer.Option(help="The same for all other weights; default: by --gemm-dtype")
    ] = None,
    launch_s: Annotated[
        float, typer.Option(min=0, help="Seconds per kernel launch; not in the tables")
    ] = defaults.LAUNCH_S,
    host_s: Annotated[
        float, typer.Option(min=0, help="Seconds of host time per pass; not in the tables")
    ] = defaults.HOST_S,
) -> None:
    """Import measured GEMM, attention and MoE latencies of NVIDIA's aiconfigurator for one GPU and one MoE shape."""
    from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
    from qllm.traces.step_times.aiconfigurator.notes import NOTES

    timings = import_aiconfigurator(
        source,
        shape=_shape(model),
        gpu=gpu,
        moe=moe,
        moe_dtype=moe_dtype,
        dense=dense,
        gemm_dtype=gemm_dtype,
        attention=attention,
        expert_weights=expert_weights,
        other_weights=other_weights,
        name=out.stem,
        launch_s=launch_s,
        host_s=host_s,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        timings.save(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None
    typer.echo(
        f"{out}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}; {len(timings.points)} points\n"
        f"{timings.framework}"
    )
    for key, text in {**timings.modelled, **timings.conditions}.items():
        if key in NOTES:
            typer.echo(f"{key}: {text}")


def _shape(model: str) -> Any:
    """A known shape by name, or one given as YAML with the keys of `ModelShape`."""
    from qllm.traces.comment_header import HeaderError, read_yaml
    from qllm.traces.step_times.model_shapes import SHAPES, ModelShape

    if model in SHAPES:
        return SHAPES[model]
    keys = [field.name for field in fields(ModelShape)]
    try:
        given = read_yaml(model)
    except HeaderError as error:
        raise ConfigError(f"--model: no YAML: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(
            f"--model {model}: unknown; {suggestion(model, list(SHAPES))}, or YAML with {', '.join(keys)}"
        )
    for key in given:
        if key not in keys:
            raise ConfigError(f"--model: unknown key {key!r}; {suggestion(str(key), keys)}")
    try:
        return ModelShape(**given)
    except TypeError as error:
        raise ConfigError(f"--model: {str(error).replace('ModelShape.__init__() ', '')}") from None


def _size(value: Any) -> str:
    return " x ".join(f"{part:g}" for part in value) if isinstance(value, tuple | list) else f"{value:g}"
