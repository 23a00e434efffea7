"""The tables of numbers about the policy slack."""

from __future__ import annotations

from figure_parts.markdown import markdown
from figure_parts.results import caption, load

LOAD = 0.8  #: of the rows that are shown
RATES = (2, 4, 7)  #: of the paper's set-up
PAPER_ROWS = ("priority", "chunked", "qllm", "hybrid", "slack", "slack for 3 s")


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


def slack_paper() -> str:
    """The paper's set-up: what LS gains over fcfs, and what BE and throughput pay."""
    rows = []
    found = load("slack_paper")["rows"].set_index(["rate", "policy"])
    for rate in RATES:
        for policy in PAPER_ROWS:
            r = found.loc[(rate, policy)]
            gains = f"{r['ttft_gain']:.1f}x", f"{r['turnaround_gain']:.1f}x"
            pays = f"{r['be_over_fcfs']:.2f}x", f"{r['throughput_over_fcfs']:.2f}x"
            rows.append((f"{rate:g}", policy, f"{1e3 * r['ttft_p99']:.0f}", f"{100 * r['slo']:.1f}%", *gains, *pays))
    columns = (
        "requests/s",
        "policy",
        "LS TTFT p99 ms",
        "LS SLO",
        "LS TTFT: `fcfs` over it",
        "LS turnaround: the same",
        "BE turnaround over `fcfs`",
        "throughput over `fcfs`",
    )
    return markdown(columns, rows, caption("slack_paper"))


def slack_overload() -> str:
    """Four times what the device can serve."""
    rows = []
    for _, r in load("slack_overload")["rows"].iterrows():
        ls = f"{100 * r['slo']:.1f}%", f"{r['ttft_over_isolated_p99']:.2f}"
        waits = f"{r['be_launch_max']:.0f}", f"{r['be_waiting_max']:.0f}", f"{r['be_turnaround']:.0f}"
        rows.append((r["policy"], *ls, f"{r['be_of_left']:.2f}", f"{100 * r['be_shed']:.0f}%", *waits))
    columns = (
        "policy",
        "LS SLO",
        "LS TTFT p99 / isolated",
        "BE served / what LS leaves room for",
        "BE turned away",
        "longest until its first pass, s",
        "longest in no pass, s",
        "BE turnaround, s",
    )
    return markdown(columns, rows, caption("slack_overload"))


def slack_engine() -> str:
    """The engine on a CPU, fcfs and slack in turn."""
    rows = []
    for _, r in load("slack_engine")["rows"].iterrows():
        ttft = f"{1e3 * r['ls_ttft_p50']:.0f} / {1e3 * r['ls_ttft_p99']:.0f}"
        rows.append(
            (
                f"`{r['row']}`",
                ttft,
                f"{r['p99_to_alone']:.1f}x",
                f"{1e3 * r['ls_tpot']:.0f}",
                f"{r['be_turnaround']:.1f}",
            )
        )
    columns = ("policy", "LS TTFT p50 / p99 ms", "p99 / alone", "LS TPOT ms", "BE turnaround s")
    return markdown(columns, rows, caption("slack_engine"))
