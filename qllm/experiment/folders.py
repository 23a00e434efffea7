"""Folders of results: whose they are, so that nobody's files are replaced unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qllm.config.config import Config, load_config
from qllm.config.yaml_lines import ConfigError, load_yaml
from qllm.experiment.results import CONFIG, FAILURES, make_folder

Kind = Literal["simulation", "engine", "validation", "capacity"]

POINTS = "points"  #: folder of finished simulations, inside
_OF_ONE_CONFIGURATION = (
    "timeline.json",
    "timeline.png",
    "load.parquet",
    "load.png",
    "report.html",
    FAILURES,
)  # not written by every run


def claim(out: str | Path, config: Config, kind: Kind, force: bool = False) -> Path:
    """The folder `out` for results of `config`, made if need be.

    Args:
        out: The folder.
        config: What is to be run.
        kind: How it is run.
        force: Replace what is there.

    Raises:
        ConfigError: It cannot be made, or, without `force`, holds files of somebody else or of another configuration.
    """
    folder = make_folder(out)
    there = sorted(path.name for path in folder.iterdir() if path.name != POINTS)
    if not there:
        return folder
    problem = _whose(folder, there, config, kind)
    if problem and not force:
        raise ConfigError(f"{folder}/ {problem}; allowed: another --out or name, or --force to replace it")
    if problem:
        for name in _OF_ONE_CONFIGURATION:
            (folder / name).unlink(missing_ok=True)
    return folder


def _whose(folder: Path, there: list[str], config: Config, kind: Kind) -> str:
    """What speaks against writing to `folder`, which holds `there`; nothing if it holds the same results."""
    if CONFIG not in there:
        return f"holds files that qllm did not write, such as {there[0]}"
    path = folder / CONFIG
    try:
        written: Any = load_yaml(path).data.get("provenance")
        if not isinstance(written, dict):
            return f"holds a {CONFIG} that qllm did not write"
        before = load_config(path)
    except (ConfigError, OSError):
        return f"holds a {CONFIG} that cannot be compared with this configuration"
    if (was := _kind(before)) != kind:
        named = {"engine": "an engine", "capacity": "a search for capacity"}.get(was, f"a {was}")
        return f"holds the results of {named}"
    old, new = before.model_dump(by_alias=True), config.model_dump(by_alias=True)
    differing = [key for key in new if key not in ("provenance", "name") and old[key] != new[key]]
    return f"holds results of another configuration: {', '.join(differing)} differ" if differing else ""


def _kind(config: Config) -> Kind:
    """How written results came about."""
    if "capacity" in config.provenance:
        return "capacity"
    begins = config.provenance.get("timings", "").partition(":")[0]
    return "engine" if begins == "engine" else "validation" if begins == "validation" else "simulation"
