"""qllm calibrate: measure a model on this machine and write a timing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qllm.cli.options import EXPERTS


def calibrate(
    model: Annotated[str, typer.Option(help="Checkpoint (name or folder), or a folder with only a config.json")],
    out: Annotated[Path, typer.Option(help="Timing trace to write (.csv)")],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    experts: Annotated[str, typer.Option(help=EXPERTS)] = "plain",
    max_tokens: Annotated[int, typer.Option(help="Prompt tokens of the largest pass")] = 2048,
    max_context: Annotated[int, typer.Option(help="Tokens cached before them, at most")] = 4096,
    max_batch: Annotated[int, typer.Option(help="Sequences of the largest decode batch")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as PyTorch chooses")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line: records which experts they use, next to --out")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a timing trace that --out names")] = False,
) -> None:
    """Measure step times through the engine's own passes. Minutes; an interrupted calibration goes on where it was."""
    from qllm.executor.errors import CalibrationError

    if out.exists() and not force and not out.with_name(f"{out.name}.measured").exists():
        raise CalibrationError(f"--out {out}: is there already; allowed: another --out, or --force to replace it")
    import torch

    from qllm.executor.calibration.calibrate import Extent, calibrate
    from qllm.executor.calibration.routing import record_popularity
    from qllm.executor.model.loading import load
    from qllm.experiment.progress import progress
    from qllm.traces.files import not_regular

    if prompts is not None and not prompts.is_file():
        raise CalibrationError(f"--prompts {prompts}: {not_regular(prompts)}")
    if threads is not None:
        torch.set_num_threads(threads)
    extent = Extent(max_tokens, max_context, max_batch)
    with progress("loading the model"):
        loaded = load(model, device=device, dtype=dtype, experts=experts, random_weights=True)
    try:
        with progress("measuring") as update:
            timings = calibrate(loaded, out, extent, update)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is measured is kept in {out}.measured: the same command goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{out}: {timings.source}; {timings.device}; {timings.model}; {timings.dtype}")
    if prompts is not None:
        table = out.with_suffix(".popularity.csv")
        tokens = record_popularity(loaded, model, prompts, table, max_tokens)
        typer.echo(f"{table}: routing of {tokens} tokens")
