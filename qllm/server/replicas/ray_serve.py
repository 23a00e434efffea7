"""Replicas as deployments of Ray Serve, one a GPU: for `qllm serve --backend ray`, and for `serve run` (serve.yaml)."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qllm.config.yaml_lines import ConfigError
from qllm.server.app import make_app
from qllm.server.batches.settings import BatchSettings
from qllm.server.process.load import load_engine
from qllm.server.process.serve import run
from qllm.server.replicas.app import make_replicas_app
from qllm.server.replicas.choice import Report
from qllm.server.replicas.engine import EngineReplica
from qllm.server.replicas.relay import Asked
from qllm.server.replicas.router import ReplicaLost, Router
from qllm.server.settings import ServerSettings, load_settings
from qllm.traces.messages import dotted
from qllm.traces.requests.strict_model import Count, StrictModel, explain

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use over the network otherwise
try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException
except ImportError:
    raise ConfigError("--backend ray: not installed; install it with: pip install 'qllm-moe[ray]'") from None

QUIET = {"enable_access_log": False, "log_level": "WARNING"}  #: the router logs requests; reports come all the time


class ReplicaOptions(StrictModel):
    """What each replica is made of."""

    model: str | None = None  #: a folder or a model hub's name; none: the demo's random model
    device: str = "cpu"
    dtype: str = "auto"
    experts: str = "plain"
    trust_remote_code: bool = False
    graphs: str = "load"
    replicas: Count = 2
    cpus: Count = 1  #: of each replica on a CPU

    def resources(self) -> dict[str, Any]:
        """What Ray has to find for each of them."""
        return {"num_cpus": self.cpus} if self.device == "cpu" else {"num_cpus": 1, "num_gpus": 1}


class Deployed(EngineReplica):
    """An engine in a process of Ray's.

    Args:
        options: what it is made of.
        settings: of the server.
    """

    async def __init__(self, options: ReplicaOptions, settings: ServerSettings):  # type: ignore[misc]
        given = options.model_dump(exclude={"model", "replicas", "cpus"})
        self._engine, name = load_engine(options.model, settings, **given)
        # Batches belong to the router: a folder serves one server at a time.
        own = {"model_name": settings.model_name or name, "batches": BatchSettings()}
        app = make_app(self._engine, settings.model_copy(update=own))
        super().__init__(app)
        self._lifespan = app.router.lifespan_context(app)
        await self._lifespan.__aenter__()

    def check_health(self) -> None:
        """Called by Ray now and then, which starts the replica again where this raises."""
        if not self._service.alive:
            raise RuntimeError("the engine does not serve any more")

    async def __del__(self) -> None:  # Ray waits for it
        await self._lifespan.__aexit__(None, None, None)
        self._engine.close()


class RayReplica:
    """A replica as its router sees it.

    Args:
        handle: Ray Serve's, of a deployment with one replica.
    """

    def __init__(self, handle: Any):
        self._handle = handle

    async def ask(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """What its application answers; to close the generator is to go away."""
        with lost():
            messages = self._handle.options(stream=True).ask.remote(asked)
            try:
                async for message in messages:
                    yield message
            finally:
                messages.cancel()

    async def line(self, path: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The HTTP status and body that a line of a batch gets."""
        with lost():
            return await self._handle.line.remote(path, data)  # type: ignore[no-any-return]

    async def report(self) -> Report:
        """What it has to do."""
        with lost():
            return await self._handle.report.remote()  # type: ignore[no-any-return]

    async def end_all(self) -> None:
        """End what is under way: its clients get an error."""
        with lost():
            await self._handle.end_all.remote()


class Ingress:
    """The router behind Ray's own HTTP servers, for `serve run`.

    Args:
        settings: of the server.
        handles: of the replicas.
    """

    async def __init__(self, settings: ServerSettings, *handles: Any):  # type: ignore[misc]
        self._app = make_replicas_app(Router(settings, [RayReplica(handle) for handle in handles]))
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def __call__(self, request: Request) -> Response:
        """Ray sends what this returns."""
        return Whole(self._app)

    async def __del__(self) -> None:  # Ray waits for it
        await self._lifespan.__aexit__(None, None, None)


class Whole(Response):
    """The answer of an application, whatever it is."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":  # Ray sets the request's id itself
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, tell)


@contextmanager
def lost() -> Iterator[None]:
    """Ray's errors of a call as ReplicaLost."""
    try:
        yield
    except (RayError, RayServeException) as error:
        raise ReplicaLost(type(error).__name__) from error


def deployments(options: ReplicaOptions, settings: ServerSettings) -> list[Any]:
    """The replicas, a deployment for each: so the router says which of them gets a request, and not Ray."""
    made = serve.deployment(Deployed).options(
        num_replicas=1,
        ray_actor_options=options.resources(),
        max_ongoing_requests=2 * settings.max_connections,  # Ray would let the others wait unseen; admission counts
        health_check_period_s=2,
        logging_config=QUIET,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    return [made.options(name=f"replica-{i}").bind(options, settings) for i in range(options.replicas)]


def application(args: dict[str, Any]) -> Any:
    """The application of serve.yaml.

    Args:
        args: fields of ReplicaOptions, and `settings`: those of the server, or `config`: a file with them.
    """
    args = dict(args)
    path, given = args.pop("config", None), args.pop("settings", {})
    try:
        settings = ServerSettings.model_validate(given) if path is None else load_settings(path)
        options = ReplicaOptions.model_validate(args)
    except ValidationError as error:
        key, text = explain(error, args | given)
        raise ConfigError(f"args: {dotted(key)}: {text}") from None
    ingress = serve.deployment(Ingress).options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections,
        logging_config=QUIET,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    return ingress.bind(settings, *deployments(options, settings))


@contextmanager
def cluster(options: ReplicaOptions) -> Iterator[None]:
    """Ray: the cluster that RAY_ADDRESS names, else one of this machine. Raises ConfigError."""
    here: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        here = {"include_dashboard": False, "object_store_memory": 256 << 20}
        if options.device == "cpu":
            here["num_cpus"] = options.replicas * options.cpus
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **here)
    except (OSError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "home")
        raise ConfigError(f"--backend ray: no cluster at {address}: {error}") from None
    try:
        found = ray.cluster_resources().get("GPU", 0)
        if here and options.device != "cpu" and found < options.replicas:
            raise ConfigError(f"--replicas {options.replicas}: one GPU each; allowed: at most {found:g}, the GPUs here")
        yield
    finally:
        ray.shutdown()


def serve_replicas(
    options: ReplicaOptions, settings: ServerSettings, host: str, port: int, listening: Callable[[str, str], None]
) -> None:
    """Serve until a signal comes. The router is in this process; Ray runs the replicas.

    Args:
        options: of the replicas.
        settings: of the server.
        host: address to listen at.
        port: the same; 0 for any that is free.
        listening: is told the model's name and the address once the server can be reached.

    Raises:
        ConfigError: no cluster, not enough of it, or a replica does not start.
    """
    with cluster(options):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        made = deployments(options, settings)
        run_id = secrets.token_hex(4)  # on a cluster there may be others
        names = [f"qllm-{run_id}-{i}" for i in range(len(made))]
        targets = [serve.RunTarget(one, name=name, route_prefix=None) for one, name in zip(made, names, strict=True)]
        try:
            try:
                handles = serve.run_many(targets)
            except RuntimeError as error:
                raise ConfigError(f"--backend ray: {_cause(names)}") from error
            router = Router(settings, [RayReplica(handle) for handle in handles])
            app = make_replicas_app(router)
            run(app, settings, host, port, lambda url: listening(router.model, url))
        finally:
            if "RAY_ADDRESS" in os.environ:  # others may use it
                for name in names:
                    serve.delete(name)
            else:
                serve.shutdown()


def _cause(names: list[str]) -> str:
    """Why a replica does not start: the last line of what it raised."""
    states = serve.status().applications
    told = [
        one.message
        for name in names
        if name in states
        for one in states[name].deployments.values()
        if "Error" in one.message
    ]
    lines = [line.strip() for text in told for line in text.splitlines() if "Error" in line]
    return f"a replica does not start: {lines[-1]}" if lines else "a replica does not start"
