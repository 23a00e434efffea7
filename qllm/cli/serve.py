"""qllm serve: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from qllm.cli.options import EXPERTS
from qllm.cli.run import GraphsChoice


class BackendChoice(StrEnum):
    """Where engines run."""

    process = "process"
    ray = "ray"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint: a folder or a model hub's name; without one, a small random MoE made on the spot",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy of the scheduler; default: the configuration's, else slack")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free")] = 8000,
    config: Annotated[Path | None, typer.Option(help="YAML file with the server's settings")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16")] = "auto",
    experts: Annotated[str, typer.Option(help=EXPERTS)] = "plain",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint")
    ] = False,
    graphs: Annotated[
        GraphsChoice, typer.Option(help="On a GPU: when short passes are recorded as CUDA graphs")
    ] = GraphsChoice.load,
    replicas: Annotated[int, typer.Option(min=1, help="Engines, one a GPU; more than one need --backend ray")] = 1,
    backend: Annotated[
        BackendChoice, typer.Option(help="process: an engine in this process; ray: behind Ray Serve")
    ] = BackendChoice.process,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log a line for each request")] = False,
) -> None:
    """Serve a model by OpenAI's API, urgent requests before running ones."""
    from qllm.config.yaml_lines import ConfigError

    needed = {"executor": ("torch", "transformers", "greenlet"), "server": ("fastapi", "uvicorn")}
    for extra, names in needed.items():
        missing = [name for name in names if find_spec(name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not installed; the server needs: pip install 'qllm-moe[{extra}]'")
    if replicas > 1 and backend is not BackendChoice.ray:
        raise ConfigError(f"--replicas {replicas}: one process holds one engine; allowed: with --backend ray")
    from qllm.server.process.load import load_engine
    from qllm.server.process.serve import is_loopback, run
    from qllm.server.settings import load_settings

    settings = load_settings(config)
    if policy is not None:
        settings = settings.with_policy(policy)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if not is_loopback(host) and not settings.api_keys:
        typer.echo(f"warning: everybody who reaches {host} may use this server; api_keys asks for a key", err=True)

    def listening(name: str, url: str) -> None:
        typer.echo(f"serving {name} at {url}/v1", err=True)

    chosen: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "experts": experts,
        "trust_remote_code": trust_remote_code,
        "graphs": graphs.value,
    }
    if backend is BackendChoice.ray:
        from qllm.server.replicas.ray_serve import ReplicaOptions, serve_replicas

        cpus = max(1, (os.cpu_count() or 1) // replicas)
        options = ReplicaOptions(model=model, replicas=replicas, cpus=cpus, **chosen)
        serve_replicas(options, settings, host, port, listening)
        return
    engine, name = load_engine(model, settings, **chosen)
    with engine:
        from qllm.server.app import make_app

        app = make_app(engine, settings.model_copy(update={"model_name": settings.model_name or name}))
        run(app, settings, host, port, lambda url: listening(app.state.service.name, url))
