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

SHAPE_HELP = "Name of a known shape, a Hugging Face config.json, or YAML '{name: ..., layers: ..., ...}'"
app = typer.Typer(no_args_is_help=True, help="Timing traces: what they hold, where they come from.")


@app.command()
def describe(
    file: Annotated[str | None, typer.Argument(help="Timing trace or bundled name; default: list the bundled")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Device, model, source, licence and measured ranges of a timing trace, and what of it is not plausible."""
    from qllm.traces.step_times.timings import Timings, TimingWarning, bundled_timings

    if file is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TimingWarning)  # `list` says what does not fit
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


@app.command("list")
def list_(
    gpu: Annotated[str | None, typer.Option(help="Only this GPU, as h200")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model, or part of its name")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """The timing traces that ship: GPU, model, dtype, source, and how many times the GPU's roofline a pass takes."""
    from qllm.cli.timings_list import CONTEXT, DECODE, PROMPT, rows
    from qllm.traces.step_times.timings import bundled_timings

    found = rows(gpu, model)
    if not found:
        given = " and ".join(f"--{key} {word}" for key, word in (("gpu", gpu), ("model", model)) if word)
        raise ConfigError(f"{given}: no timing trace ships; allowed: parts of {', '.join(bundled_timings())}")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{'name':<28} {'source':<9} {'decode':>7} {'prefill':>8} {'weights / memory':>17}  GPU; dtype")
    for row in found:
        times = [f"{row[key]:.2f}x" if row[key] else "-" for key in ("decode_over_roofline", "prefill_over_roofline")]
        room = f"{row['weights_gb']:g} / {row['memory_gb']:g} GB"
        beyond = "" if row["fits"] else "; does NOT fit in one"
        typer.echo(
            f"{row['name']:<28} {row['source']:<9} {times[0]:>7} {times[1]:>8} {room:>17}  "
            f"{row['gpu']}; {row['dtype']}{beyond}"
        )
    typer.echo(
        f"decode, prefill: times the least that the GPU needs, of {DECODE} sequences over {CONTEXT} tokens and of a "
        f"prompt of {PROMPT}.\nMore: `timings: {{gpu: ..., model: ..., dtype: ...}}` imports from {defaults.SOURCE} "
        "where that is installed (extra `timings`); `qllm timings roofline` models what has no table."
    )


@app.command("import")
def import_(
    out: Annotated[Path, typer.Argument(help="Timing trace to write (.csv)", show_default=False)],
    model: Annotated[str, typer.Option(help=SHAPE_HELP)],
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
    _save(timings, out)
    typer.echo(timings.framework)
    for key, text in {**timings.modelled, **timings.conditions}.items():
        if key in NOTES:
            typer.echo(f"{key}: {text}")


@app.command()
def roofline(
    out: Annotated[Path, typer.Option(help="Timing trace to write (.csv)", show_default=False)],
    gpu: Annotated[
        str,
        typer.Option(help="A GPU of known data sheet, as a100_sxm, h200, l40s; for another one, change its numbers"),
    ],
    model: Annotated[str | None, typer.Option(help=SHAPE_HELP)] = None,
    hf_config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or its folder, in place of --model")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the experts' weights: bf16, fp8, int4, mxfp4, ...; default: by config.json")
    ] = None,
    other_dtype: Annotated[
        str | None, typer.Option(help="Of all other weights; default: as the experts in 8 bits or more, else bf16")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s of the memory; default: data sheet")] = None,
    flops: Annotated[float | None, typer.Option(help="Operations/s in 16 bits, dense; default: data sheet")] = None,
    fp8_flops: Annotated[float | None, typer.Option(help="The same in 8 bits")] = None,
    fp4_flops: Annotated[float | None, typer.Option(help="The same in 4 bits")] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes of memory; default: data sheet")] = None,
    memory_efficiency: Annotated[
        float, typer.Option(help="Share of the bandwidth that kernels reach (aiconfigurator's)")
    ] = defaults.MEMORY_EFFICIENCY,
    gemm_efficiency: Annotated[
        float, typer.Option(help="Share of the peak in GEMMs (fitted to A100 tables)")
    ] = defaults.GEMM_EFFICIENCY,
    expert_efficiency: Annotated[
        float, typer.Option(help="Share of the peak in MoE kernels (fitted to A100 tables)")
    ] = defaults.EXPERT_EFFICIENCY,
    attention_efficiency: Annotated[
        float, typer.Option(help="Share of the peak in attention of prompts (fitted to A100 tables)")
    ] = defaults.ATTENTION_EFFICIENCY,
    kernel_s: Annotated[
        float, typer.Option(help="Seconds of a kernel beside its work (aiconfigurator's)")
    ] = defaults.KERNEL_S,
    attention_s: Annotated[
        float, typer.Option(help="The same of an attention kernel (A100 tables)")
    ] = defaults.ATTENTION_S,
    experts_base_s: Annotated[
        float, typer.Option(help="The same of a layer's MoE kernels (A100 tables)")
    ] = defaults.EXPERTS_BASE_S,
    launch_s: Annotated[float, typer.Option(help="Seconds per kernel launch; a parameter")] = defaults.LAUNCH_S,
    host_s: Annotated[float, typer.Option(help="Seconds of host time per pass; a parameter")] = defaults.HOST_S,
) -> None:
    """Model a timing trace from a GPU's data sheet and a model's shape: for what has no measured table."""
    from qllm.traces.step_times.data_sheet import DATA_SHEETS, data_sheet_name
    from qllm.traces.step_times.hf_config import weights_dtype
    from qllm.traces.step_times.model_shapes import PUBLISHED
    from qllm.traces.step_times.modelled import Costs, roofline_timings

    if (model is None) == (hf_config is None):
        raise ConfigError("give --model or --hf-config, one of them")
    file = hf_config or (model if _is_file(model or "") else None)
    shape = _shape(str(hf_config or model))
    changed: dict[str, Any] = {
        key: value
        for key, value in (
            ("bandwidth", bandwidth),
            *(("flops", flops), ("fp8_flops", fp8_flops), ("fp4_flops", fp4_flops), ("memory", memory)),
        )
        if value is not None
    }
    sheet = DATA_SHEETS[data_sheet_name(gpu)]
    if changed:  # no longer that GPU
        changed["device"] = f"{sheet.device} with {', '.join(f'{key} {value:g}' for key, value in changed.items())}"
    timings = roofline_timings(
        shape,
        sheet._replace(**changed),
        dtype=dtype or (weights_dtype(file) if file else PUBLISHED.get(shape.name, "bf16")),
        other_dtype=other_dtype,
        costs=Costs(
            memory_efficiency=memory_efficiency,
            gemm_efficiency=gemm_efficiency,
            expert_efficiency=expert_efficiency,
            attention_efficiency=attention_efficiency,
            kernel_s=kernel_s,
            attention_s=attention_s,
            experts_base_s=experts_base_s,
            launch_s=launch_s,
            host_s=host_s,
        ),
        name=out.stem,
    )
    _save(timings, out)
    for line in timings.implausible():
        typer.echo(f"note: {line}", err=True)


def _save(timings: Any, out: Path) -> None:
    """Write the file and say what is in it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        timings.save(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None
    typer.echo(
        f"{out}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}; {len(timings.points)} points"
    )


def _is_file(model: str) -> bool:
    """Whether a shape is given as a config.json or the folder of one."""
    return model.endswith(".json") or (bool(model) and Path(model).is_dir())


def _shape(model: str) -> Any:
    """A known shape by name, that of a config.json, or one given as YAML with the keys of `ModelShape`."""
    from qllm.traces.comment_header import HeaderError, read_yaml
    from qllm.traces.step_times.hf_config import shape_from_config
    from qllm.traces.step_times.model_shapes import SHAPES, ModelShape

    if model in SHAPES:
        return SHAPES[model]
    if _is_file(model):
        return shape_from_config(model)
    keys = [field.name for field in fields(ModelShape)]
    try:
        given = read_yaml(model)
    except HeaderError as error:
        raise ConfigError(f"--model: no YAML: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(
            f"--model {model}: unknown; {suggestion(model, list(SHAPES))}, a config.json, "
            f"or YAML with {', '.join(keys)}"
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
