"""What a search for capacity gives: tables in memory and on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qllm.capacity.search import Found
from qllm.config.config import RATE, Config
from qllm.config.from_config import load_timings
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.metrics import BOUNDS
from qllm.experiment.paired import mean_interval, paired_rows
from qllm.experiment.results import Results, make_folder, write_config
from qllm.experiment.run import Run

FILES = ("capacity", "classes", "seeds", "curve", "differences")  #: tables, each as parquet and CSV
_OF_CLASS = ("slo_attainment", *BOUNDS.values(), "ttft_p99_s", "tpot_p99_s", "turnaround_mean_s", "saturated")


@dataclass(frozen=True)
class Capacity:
    """What was found; rates in requests per second, of all classes on all GPUs unless it says otherwise.

    Attributes:
        capacity: A row per point and policy: policy, swept keys, rate_rps with its 95 % interval rate_lo_rps and
            rate_hi_rps, saturation_rps, limit (what fails just above: "saturation", or "ls: ttft"), seeds, gpus,
            rate_per_gpu_rps, output_tokens_per_s, tokens_per_s (prompts too) and, with a price,
            cost_per_million_output_tokens and cost_per_million_tokens.
        classes: A row per point, policy and class at that rate: policy, swept keys, class, rate_rps,
            output_tokens_per_s, and metrics of the summary, requests of all seeds pooled.
        seeds: A row per point, policy and seed: the capacity of the seed by itself, how many runs that took, and how
            many of them were ended early.
        curve: The summary at each rate that was simulated whole (see qllm.experiment.metrics).
        config: The resolved configuration, with provenance.
    """

    capacity: pd.DataFrame
    classes: pd.DataFrame
    seeds: pd.DataFrame
    curve: pd.DataFrame
    config: Config

    @property
    def differences(self) -> pd.DataFrame:
        """Every two policies, seed by seed: the columns of `qllm.experiment.paired.differences`."""
        titles = [policy.title for policy in self.config.policies]
        seeds = self.seeds.assign(all="")
        found = paired_rows(seeds, "policy", titles, ["all", *self.config.sweep], ["rate_rps", "saturation_rps"])
        return found.drop(columns="all")

    def save(self, out: str | Path) -> Path:
        """Write each table of `FILES` as parquet and CSV, capacity.json with all of it, and config.yaml; return `out`.

        Raises:
            ConfigError: The folder cannot be made or written.
        """
        folder = make_folder(out)
        try:
            for name in FILES:
                table: pd.DataFrame = getattr(self, name)
                pq.write_table(pa.Table.from_pandas(table, preserve_index=False), folder / f"{name}.parquet")
                table.to_csv(folder / f"{name}.csv", index=False, float_format="%.9g", lineterminator="\n")
            (folder / "capacity.json").write_text(json.dumps(self.plain(), indent=1) + "\n", encoding="utf-8")
            write_config(self.config, folder)
        except OSError as error:
            raise ConfigError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
        return folder

    def plain(self) -> dict[str, Any]:
        """All tables but the curve, and the provenance, as plain data; what is undefined is null."""
        tables = {name: records(getattr(self, name)) for name in FILES if name != "curve"}
        return {"provenance": self.config.provenance, **tables}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain data; what is undefined becomes null."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(key): _number(value) for key, value in row.items()} for row in rows]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def capacity_table(
    seeds: Sequence[list[Run]],
    found: Sequence[Found],
    before: Sequence[Sequence[Found]],
    results: Results,
) -> pd.DataFrame:
    """The table `Capacity.capacity`."""
    rows = []
    for mine, one, alone in zip(seeds, found, before, strict=True):
        cells = {key: value for key, value in mine[0].cells.items() if key != RATE}
        half = _half_width([each.rate for each in alone])
        tokens = _tokens(results, mine[0].title, cells, one.rate)
        here = mine[0].config
        price = price_of(here)
        row: dict[str, Any] = {
            "policy": mine[0].title,
            **cells,
            "rate_rps": one.rate,
            "rate_lo_rps": float(np.maximum(0.0, one.rate - half)),
            "rate_hi_rps": one.rate + half,
            "saturation_rps": one.saturation,
            "limit": one.limit,
            "seeds": len(mine),
            "gpus": here.replicas,
            "rate_per_gpu_rps": one.rate / here.replicas,
            "output_tokens_per_s": one.rate * tokens["output_tokens"],
            "tokens_per_s": one.rate * (tokens["output_tokens"] + tokens["prompt_tokens"]),
        }
        if price is not None:
            for kind, per_s in (("output_tokens", row["output_tokens_per_s"]), ("tokens", row["tokens_per_s"])):
                row[f"cost_per_million_{kind}"] = price * here.replicas / 3600 / per_s * 1e6 if per_s else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def price_of(config: Config) -> float | None:
    """What an hour of the configured GPU costs, None where no price is given. ConfigError where only others' are."""
    given = config.capacity
    if not given.prices:
        return given.price_per_gpu_hour
    device = load_timings(config.timings).device
    named = [name for name in given.prices if name.lower() in device.lower()]
    if not named:
        raise ConfigError(
            f"capacity.prices: none is that of {device!r}; allowed: a part of its name beside {', '.join(given.prices)}"
        )
    return given.prices[max(named, key=len)]


def _half_width(rates: list[float]) -> float:
    """Of the interval around a capacity: Student's t over the capacities of the seeds, each by itself; nan for one."""
    interval = mean_interval(rates)
    return interval.high - interval.mean


def _at(results: Results, policy: str, cells: dict[str, Any], rate: float) -> pd.DataFrame:
    rows = results.counted
    chosen = (rows["policy"] == policy) & (rows[RATE] == rate)
    for key, value in cells.items():
        chosen &= rows[key] == value
    return rows[chosen]


def _tokens(results: Results, policy: str, cells: dict[str, Any], rate: float) -> dict[str, float]:
    """Tokens per request sent, of those that finished at that rate; 0 where there is none."""
    rows = _at(results, policy, cells, rate)
    served = rows[rows["finish_s"].notna()]
    return {name: float(served[name].sum()) / max(len(rows), 1) for name in ("prompt_tokens", "output_tokens")}


def curve_table(results: Results) -> pd.DataFrame:
    """The table `Capacity.curve`: the summary, with whether any class is saturated at that point."""
    summary = results.summary
    point = [name for name in results.point_columns if name in summary]
    any_class = summary.groupby(point, sort=False, observed=True, dropna=False)["saturated"].transform("any")
    return summary.assign(policy=summary["policy"].astype(str), saturated_any=any_class)


def class_table(config: Config, found: pd.DataFrame, results: Results) -> pd.DataFrame:
    """The table `Capacity.classes`."""
    parts = []
    for row in found.to_dict("records"):
        cells = {key: row[key] for key in config.sweep}
        sent = _at(results, row["policy"], cells, row["rate_rps"])
        summary = results.summary
        chosen = (summary["policy"] == row["policy"]) & (summary[RATE] == row["rate_rps"])
        for key, value in cells.items():
            chosen &= summary[key] == value
        for metrics in summary[chosen].to_dict("records"):
            mine = sent[sent["class"] == metrics["class"]]
            rate = row["rate_rps"] * len(mine) / len(sent)
            output = float(mine.loc[mine["finish_s"].notna(), "output_tokens"].sum()) / max(len(mine), 1)
            head = {"policy": row["policy"], **cells, "class": metrics["class"], "rate_rps": rate}
            parts.append({**head, "output_tokens_per_s": rate * output, **{name: metrics[name] for name in _OF_CLASS}})
    columns = ["policy", *config.sweep, "class", "rate_rps", "output_tokens_per_s", *_OF_CLASS]
    return pd.DataFrame(parts, columns=columns)
