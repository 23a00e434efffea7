"""The results of a simulation in memory and on disk: tables as parquet and CSV, and config.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qllm.config.config import RATE, Config, load_config
from qllm.config.schema import Slo
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.metrics import after_warmup, judged, summarise
from qllm.experiment.paired import differences
from qllm.traces.files import is_input_path, portable_path
from qllm.traces.messages import first_line

REQUESTS, SUMMARY, CONFIG, FAILURES = "requests.parquet", "summary.csv", "config.yaml", "failures.csv"
DIFFERENCES = "differences.csv"


@dataclass(frozen=True)
class Results:
    """What a sweep gave.

    Attributes:
        requests: A row per request and run: policy, rate, further swept keys, seed, id, class, arrival_s,
            prompt_tokens, output_tokens, first_launch_s, first_token_s, finish_s, queueing_s, running_s, suspended_s,
            preemptions, evictions, kv_peak (of the run), isolated_ttft_s, status, reason. What requests brought of
            their own stands behind output_tokens, as far as any did: max_ttft_s, max_tpot_s (nan: no bound), tenant,
            tags (as lane=batch;region=eu). Policies go by that; the summary judges by the SLO of the class alone.
        summary: A row per point and class (see qllm.experiment.metrics).
        config: The resolved configuration, with provenance.
        failures: A row per simulation that failed: policy, swept keys, seed, error; the other tables lack these.
    """

    requests: pd.DataFrame
    summary: pd.DataFrame
    config: Config
    failures: pd.DataFrame = field(default_factory=pd.DataFrame)

    @classmethod
    def of(cls, requests: pd.DataFrame, config: Config, failures: pd.DataFrame | None = None) -> Results:
        """Results with the summary worked out from `requests`."""
        lacking = [name for name in ("tenant", "tags") if name in requests and requests[name].isna().any()]
        if lacking:  # some of the runs had no such column
            texts = {name: requests[name].astype(object).fillna("").astype("category") for name in lacking}
            requests = requests.assign(**texts)
        parts = [summarise(rows, _slos(at), list(config.sweep), at.warmup) for at, rows in _by_bounds(requests, config)]
        return cls(requests, pd.concat(parts), config, pd.DataFrame() if failures is None else failures)

    @property
    def point_columns(self) -> list[str]:
        """The columns that name a policy at a point of the sweep."""
        return ["policy", RATE, *(key for key in self.config.sweep if key != RATE)]

    @cached_property
    def counted(self) -> pd.DataFrame:
        """The requests after the warm-up with what is said of each: see `judged` of qllm.experiment.metrics."""
        parts = []
        for at, rows in _by_bounds(self.requests, self.config):
            if at.warmup is not None:
                keys = [*self.point_columns, "seed"]
                rows = pd.concat(
                    [after_warmup(run, at.warmup) for _, run in rows.groupby(keys, sort=False, observed=True)]
                )
            parts.append(judged(rows, _slos(at)))
        return pd.concat(parts)

    @cached_property
    def per_seed(self) -> pd.DataFrame:
        """The summary of each seed by itself, with the column seed."""
        seeds = self.requests.groupby("seed", sort=True)
        parts = [Results.of(rows, self.config).summary.assign(seed=seed) for seed, rows in seeds]
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Every two policies compared on common seeds (see qllm.experiment.paired); without intervals for one seed."""
        return differences(self)

    @cached_property
    def slos(self) -> dict[str, list[Slo]]:
        """The SLO of each class: none, one, or those that were swept."""
        found: dict[str, list[Slo]] = {name: [] for name in self.config.classes}
        for at, _ in _by_bounds(self.requests, self.config):
            for name, slo in _slos(at).items():
                found[name] += [slo] if slo is not None and slo not in found[name] else []
        return found

    def save(self, out: str | Path) -> Path:
        """Write requests.parquet, summary.csv and config.yaml; return `out`.

        And differences.csv where there are several policies and seeds, failures.csv where something failed.

        Args:
            out: The folder, made if need be.

        Raises:
            ConfigError: The folder cannot be made or written.
        """
        folder = make_folder(out)
        try:
            self._write(folder)
        except OSError as error:
            raise ConfigError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
        return folder

    def _write(self, folder: Path) -> None:
        table = pa.Table.from_pandas(self.requests, preserve_index=False).replace_schema_metadata(None)
        pq.write_table(table, folder / REQUESTS, compression="zstd")
        self.summary.to_csv(folder / SUMMARY, index=False, float_format="%.9g", lineterminator="\n")
        if len(self.config.policies) > 1 and self.requests["seed"].nunique() > 1:
            self.differences.to_csv(folder / DIFFERENCES, index=False, float_format="%.9g", lineterminator="\n")
        else:
            (folder / DIFFERENCES).unlink(missing_ok=True)
        if self.failures.empty:
            (folder / FAILURES).unlink(missing_ok=True)  # of an earlier run
        else:
            self.failures.to_csv(folder / FAILURES, index=False, lineterminator="\n")
        write_config(self.config, folder)


def make_folder(out: str | Path) -> Path:
    """The folder `out`, made if need be. ConfigError where that cannot be done."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be made: {error.strerror or error}") from None
    return folder


def load_results(folder: str | Path) -> Results:
    """Read results back; the summary is worked out anew from the requests.

    Args:
        folder: What `qllm simulate --out FOLDER` wrote.

    Raises:
        ConfigError: The folder does not hold results.
    """
    folder = Path(folder)
    for name in (REQUESTS, CONFIG):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name}: no such file; expected a folder written by qllm simulate --out")
    try:
        requests = pq.read_table(folder / REQUESTS).to_pandas()
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{folder / REQUESTS}: not a parquet file: {first_line(error)}") from None
    failures = pd.read_csv(folder / FAILURES) if (folder / FAILURES).is_file() else None
    config = load_config(folder / CONFIG)
    needed = {"policy", RATE, "class", "seed", "status", "finish_s", *config.sweep}
    if requests.empty or not needed <= set(requests.columns):
        raise ConfigError(f"{folder / REQUESTS}: holds no requests of a simulation; expected what qllm simulate wrote")
    return Results.of(requests, config, failures)


def _slos(config: Config) -> dict[str, Slo | None]:
    return {name: job.slo for name, job in config.classes.items()}


def _by_bounds(requests: pd.DataFrame, config: Config) -> list[tuple[Config, pd.DataFrame]]:
    """The rows with each SLO and warm-up that is swept, and a configuration that has these; else all rows."""
    keys = [key for key in config.sweep if key.partition(".")[0] in ("classes", "warmup")]
    if not keys:
        return [(config, requests)]
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point, named in zip(config.points(), config.point_cells(), strict=True):
        points.setdefault(tuple(named[key] for key in keys), point)
    found = [
        (config.at(point), requests[(requests[keys] == list(values)).all(axis=1)]) for values, point in points.items()
    ]
    return [(at, rows) for at, rows in found if len(rows)]


def write_config(config: Config, folder: Path) -> None:
    """Write config.yaml, its absolute paths relative to `folder`, so that both can move together."""
    plain = portable(config.model_dump(exclude_none=True, by_alias=True), folder)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def portable(value: Any, start: Path) -> Any:
    """Plain data with the absolute paths of its files and folders as `portable_path` writes them."""
    if isinstance(value, dict):
        return {key: portable(item, start) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, start) for item in value]
    return portable_path(value, start) if is_input_path(value) else value
