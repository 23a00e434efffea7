"""qllm validate: the same requests on the real engine and in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qllm.cli.options import EXPERTS, FORCE, SET


def validate(
    config: Annotated[Path, typer.Argument(help="YAML file; its seeds are repeats", show_default=False)],
    model: Annotated[str, typer.Option(help="Checkpoint (name or folder), or a folder with only a config.json")],
    timings: Annotated[Path, typer.Option(help="Timing trace of this model on this device (qllm calibrate)")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: out/<name>-validation")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    experts: Annotated[str, typer.Option(help=EXPERTS)] = "plain",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as PyTorch chooses")] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE)] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
) -> None:
    """Replay a workload on the real engine, simulate it, and print and plot the differences."""
    import torch

    from qllm.config.config import load_config
    from qllm.executor.calibration.environment import device_name
    from qllm.executor.model.info import model_facts
    from qllm.executor.model.loading import load
    from qllm.experiment.engines import Engines
    from qllm.experiment.folders import claim
    from qllm.experiment.results import write_config
    from qllm.experiment.run import runs
    from qllm.traces.step_times.timings import Timings
    from qllm.validation.results import report, save
    from qllm.validation.validate import compare

    if threads is not None:
        torch.set_num_threads(threads)
    trace = Timings.load(timings)
    loaded = load_config(config, [f"timings={timings.resolve()}", *(set_ or [])])
    folder = claim(out or Path("out") / f"{loaded.name}-validation", loaded, "validation", force)
    subject = load(model, device=device, dtype=dtype, experts=experts, random_weights=True)
    facts = model_facts(subject.model)
    checked = {key: facts[key] for key in ("layers", "hidden", "experts", "top_k", "dtype")}
    trace.check_matches(device=device_name(subject.model.device), **checked)
    compared = []
    with Engines(subject) as engines:
        for number, run in enumerate(todo := runs(loaded), start=1):
            typer.echo(f"{number}/{len(todo)}: {run}", err=True)
            compared.append(compare(run, subject, engines))
    save(compared, folder)
    named = f"validation: {trace.name}; {device_name(subject.model.device)}; {subject.name}"
    write_config(loaded.model_copy(update={"provenance": {"timings": named}}), folder)
    typer.echo(report(folder))
    typer.echo(f"{folder}/: requests.csv, errors.csv, passes.csv, validation.png")
