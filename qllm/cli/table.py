"""The summary as it is printed: a table, or JSON."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from qllm.experiment.results import Results


class Format(StrEnum):
    """How the summary is printed."""

    table = "table"
    json = "json"


def records(results: Results) -> list[dict[str, Any]]:
    """The summary's rows as plain data; what is undefined becomes null."""
    rows = results.summary.astype(object).where(results.summary.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


#: Columns of the printed table: header, column of the summary, digits. Those of single bounds stand there only where a
#: class has several.
_PRINTED = (
    ("TTFT\nmean s", "ttft_mean_s", ".3f"),
    ("TTFT\np99 s", "ttft_p99_s", ".3f"),
    ("p99 /\nalone", "ttft_over_isolated_p99", ".1f"),
    ("blocking\np99 ms", "blocking_p99_s", ".1f"),
    ("TPOT\nms", "tpot_mean_s", ".0f"),
    ("TPOT\np99 ms", "tpot_p99_s", ".0f"),
    ("turn-\naround s", "turnaround_mean_s", ".1f"),
    ("TTFT\nmet", "slo_ttft_met", ".1%"),
    ("x alone\nmet", "slo_ttft_over_isolated_met", ".1%"),
    ("TPOT\nmet", "slo_tpot_met", ".1%"),
    ("e2e\nmet", "slo_e2e_met", ".1%"),
    ("SLO\nmet", "slo_attainment", ".1%"),
    ("done\nper s", "throughput_rps", ".2f"),
    ("satu-\nrated", "saturated", ""),
    ("pre-\nempted", "preemptions", "d"),
    ("evic-\nted", "evictions", "d"),
    ("rejec-\nted", "rejected", "d"),
    ("KV\npeak", "kv_peak", ".0%"),
)
_ALL = "(all)"  #: in place of a class, in the rows of totals
_WIDTH = 1000  #: columns, more than any table needs
_REASONS = 5  #: reasons of rejections that are told


def print_table(results: Results, caption: str, folder: Path) -> None:
    """Print the summary, a row per point, class and policy, then `caption` and where the files are.

    Where there are several classes, their totals come last at each point.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    others = [key for key in results.config.sweep if key != "rate"]
    shown = _columns(results)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("rate", *others, "class", "policy", *(header for header, _, _ in shown)):
        table.add_column(escape(name), justify="left" if name in ("class", "policy") else "right", no_wrap=True)
    order = {name: position for position, name in enumerate([*results.config.classes, _ALL])}
    ordered = _with_totals(results).sort_values(["rate", *others], kind="stable")
    previous: Any = None
    for _, rows in ordered.groupby(["rate", *others], sort=False, dropna=False):
        for _, row in rows.sort_values("class", key=lambda names: names.map(order), kind="stable").iterrows():
            key = (row["rate"], *(row[o] for o in others), row["class"])
            if previous is not None and previous != key:
                table.add_section()
            previous = key
            table.add_row(
                f"{row['rate']:g}" if row["rate"] > 0 else "-",
                *(escape(str(row[name])) for name in (*others, "class", "policy")),
                *(_cell(row[column], digits, header) for header, column, digits in shown),
            )
    console = Console()
    console.width = _WIDTH  # a narrower one would cut the numbers
    console.print(table)
    told = [*_rejections(results), _KEY, caption, f"Results: {folder}/"]
    console.print("\n".join(told), highlight=False, markup=False, soft_wrap=True)


_KEY = (
    "Done per s: finished requests of the class / makespan, first arrival to last finish of any class. Saturated: its "
    "queue still grew when arrivals ended. KV peak: of all classes. SLO met: of the requests sent that have one."
)


def _columns(results: Results) -> list[tuple[str, str, str]]:
    """Those of `_PRINTED` that say something: attainment by bound says no more than all where each class has one."""
    from qllm.experiment.metrics import BOUNDS

    given = results.summary[list(BOUNDS.values())].notna()
    kept = set(given.columns[given.any()]) if (given.sum(axis=1) > 1).any() else set()
    return [shown for shown in _PRINTED if shown[1] not in given.columns or shown[1] in kept]


def _with_totals(results: Results) -> pd.DataFrame:
    import pandas as pd

    from qllm.experiment.metrics import totals

    if len(results.config.classes) == 1:
        return results.summary
    return pd.concat([results.summary, totals(results.summary).assign(**{"class": _ALL})], ignore_index=True)


def _rejections(results: Results) -> list[str]:
    """A line per reason for which requests were rejected, numbers in it aside, with an example."""
    rejected = results.counted[results.counted["status"] == "rejected"]
    kinds = rejected["reason"].str.replace(r"\d+", "#", regex=True)
    found = [(len(rows), str(rows["reason"].iloc[0])) for _, rows in rejected.groupby(kinds)]
    ranked = sorted(found, key=lambda reason: -reason[0])
    lines = [
        f"Rejected {count} of {len(results.counted)} requests, such as: {text}" for count, text in ranked[:_REASONS]
    ]
    more = len(ranked) - _REASONS
    return [*lines, f"Rejected for {more} more reasons: see requests.parquet"] if more > 0 else lines


def print_failures(results: Results) -> None:
    """What failed, if anything, and why."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if results.failures.empty:
        return
    table = Table(box=SIMPLE_HEAD, title="Failed, and not in the results", title_justify="left")
    for name in results.failures.columns:
        table.add_column(escape(str(name)), overflow="fold")
    for row in results.failures.itertuples(index=False):
        table.add_row(*(escape(str(value)) for value in row))
    Console().print(table)


def _cell(value: Any, digits: str, header: str) -> str:
    if value != value:  # nan
        return "-"
    if not digits:
        return "yes" if value else ""
    return format(value * 1000 if header.endswith("ms") else value, digits)
