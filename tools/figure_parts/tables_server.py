"""The tables of numbers about the server."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from figure_parts.markdown import markdown
from figure_parts.results import caption, load

SERVERS = {
    "hybrid": "this one, `hybrid`",
    "slack": "this one, `slack`",
    "vllm-priority": "vLLM, priority",
    "vllm-priority-256": "vLLM, priority, prefills cut to 256",
}


def server_load() -> str:
    """This server and vLLM's under the same requests over HTTP."""
    rows = []
    for _, r in load("server_load")["rows"].iterrows():
        times = " / ".join(f"{1e3 * r[name]:.0f}" for name in ("ls_ttft_p50", "ls_ttft_p99"))
        cells = [times, f"{1e3 * r['ls_tpot']:.0f}", f"{r['be_turnaround']:.1f}", f"{r['be_per_s']:.2f}"]
        rows.append((r["workload"], SERVERS[r["row"]], *cells, f"{r['tokens_per_s']:.0f}"))
    columns = ("", "server", "LS TTFT p50 / p99 (ms)", "LS TPOT (ms)", "BE turnaround (s)", "BE requests/s", "tokens/s")
    return markdown(columns, rows, caption("server_load"))


def server_batch() -> str:
    """Interactive requests on the idle server and beside a batch."""
    tables = load("batch")
    rows = [_window(r) for _, r in tables["windows"].iterrows() if r["window"].endswith("all")]
    columns = ("", "requests", "TTFT p50 / p90 / p99 (ms)", "TPOT p50 / p99 (ms)", "lines answered per s")
    return markdown(columns, rows, caption("batch"))


def server_checks() -> str:
    """What the server was sent to break it, and what came of it."""
    rows = [*_soak(), *_fuzz(), *_drain(), *_kill(), *_clients()]
    files = ("server_soak", "server_fuzz", "server_drain", "server_kill", "server_clients")
    return markdown(("check", "sent", "what came of it"), rows, " ".join(caption(name) for name in files))


def _soak() -> Iterator[tuple[str, ...]]:
    found = load("server_soak")
    for sent, mine in found["outcomes"].groupby("sent", sort=False):
        yield "soak", f"{mine['count'].sum():,} x {sent}", _counts(mine, "outcome")
    facts = found["facts"].iloc[0]
    held = ", ".join(f"{name} {facts[name]:g}" for name in ("num_requests_running", "kv_cache_usage_perc"))
    memory = f"{facts['warm_mb']:.0f} MB, then {facts['end_mb']:.0f}"
    yield "soak", "memory, first half and then; held at the end", f"{memory}; {held}"


def _fuzz() -> Iterator[tuple[str, ...]]:
    found = load("server_fuzz")
    answers = found["answers"]
    sent = f"{answers['count'].sum():,} requests by the OpenAPI document"
    yield "fuzz (schemathesis)", sent, _counts(answers, "status")


def _drain() -> Iterator[tuple[str, ...]]:
    for scenario, mine in load("server_drain")["outcomes"].groupby("scenario", sort=False):
        later = mine["sent"] == "after SIGTERM"
        for what, some in (("requests at the signal", mine[~later]), ("requests after it", mine[later])):
            yield f"SIGTERM, {scenario}", f"{some['count'].sum():,} {what}", _counts(some, "outcome")


def _kill() -> Iterator[tuple[str, ...]]:
    r = load("server_kill")["killed"].iloc[0]
    told = f"{r['answers']:,.0f} answers, {r['lost']:.0f} lost, {r['more than once']:.0f} more than once"
    yield "kill -9", f"{r['lines']:,.0f} lines; killed after {r['answered before the kill']:,.0f}", told


def _clients() -> Iterator[tuple[str, ...]]:
    for _, r in load("server_clients")["runs"].iterrows():
        sent = f"{r['client']} {r['version']}, {r['asked']}"
        yield "clients of others", sent, f"{r['answered']:.0f} answered, {r['failed']:.0f} failed"


def _counts(rows: pd.DataFrame, column: str) -> str:
    """How many of each, the most first."""
    counts = rows.groupby(column)["count"].sum().sort_values(ascending=False)
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _window(r: pd.Series) -> tuple[str, ...]:
    ttft = " / ".join(f"{r[f'ttft_p{q}_ms']:.0f}" for q in (50, 90, 99))
    tpot = " / ".join(f"{r[f'tpot_p{q}_ms']:.0f}" for q in (50, 99))
    name = {"idle, all": "idle", "beside, all": "beside a batch"}[r["window"]]
    return name, f"{r['requests']:.0f}", ttft, tpot, f"{r['lines_per_s']:.2f}"
