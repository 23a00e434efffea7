"""The tables of numbers about the server."""

from __future__ import annotations

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


def _window(r: pd.Series) -> tuple[str, ...]:
    ttft = " / ".join(f"{r[f'ttft_p{q}_ms']:.0f}" for q in (50, 90, 99))
    tpot = " / ".join(f"{r[f'tpot_p{q}_ms']:.0f}" for q in (50, 99))
    name = {"idle, all": "idle", "beside, all": "beside a batch"}[r["window"]]
    return name, f"{r['requests']:.0f}", ttft, tpot, f"{r['lines_per_s']:.2f}"
