"""The table of numbers about the policy slack."""

from __future__ import annotations

from figure_markdown import markdown
from figure_results import caption, load

LOAD = 0.8  #: of the rows that are shown


def slack() -> str:
    """LS latency beside what BE and throughput pay, at one load."""
    rows = []
    found = load("slack")["rows"]
    for _, r in found[found["load"] == LOAD].iterrows():
        ttft = f"{r['ttft_over_isolated_p99']:.2f} ({r['ttft_over_isolated_p99_met_no_ls']:.2f})"
        tpot = f"{r['tpot_over_isolated_p50']:.2f} / {r['tpot_over_isolated_p99']:.2f}"
        be = "-" if r["policy"] == "LS only" else f"{r['be_turnaround']:.1f} ({r['be_over_priority']:.2f}x)"
        cells = [ttft, tpot, f"{r['tpot_p99_over_ls_only']:.2f}", be]
        through = "-" if r["policy"] == "LS only" else f"{r['throughput_over_best']:.3f}"
        rows.append((f"{r['config']}, {r['rate']:.2f}/s", r["policy"], *cells, through))
    columns = (
        "",
        "policy",
        "LS TTFT p99 / isolated (met no LS)",
        "LS TPOT p50 / p99 over isolated",
        "TPOT p99 / LS only",
        "BE turnaround s (over `priority`)",
        "throughput / best",
    )
    return markdown(columns, rows, caption("slack"))
