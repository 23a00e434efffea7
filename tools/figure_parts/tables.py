"""The tables of numbers in the documents, each a function that returns Markdown."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from figure_parts.classes import three_classes
from figure_parts.markdown import markdown
from figure_parts.results import caption, load
from figure_parts.tables_capacity import capacity, prefix_cache
from figure_parts.tables_fidelity import (
    STATISTICS,
    held,
    held_out,
    held_out_box,
    roofline_gpus,
    roofline_traces,
    two_real_runs,
    validation,
    validation_average,
)
from figure_parts.tables_gpu import gpu, latents
from figure_parts.tables_models import nf4, recurrent
from figure_parts.tables_server import server_batch, server_checks, server_load
from figure_parts.tables_slack import slack, slack_engine, slack_overload, slack_paper

RATE = 0.4  #: requests/s of the table about long prompts
BEST_VLLM = "vllm-priority"
MIXED_LOAD_ROWS = {
    "fcfs": "`fcfs`",
    "priority": "`priority`",
    "chunked": "`chunked`, 512 tokens",
    "layer": "`layer`, fill_tokens 0",
    "qllm": "`qllm`, fill_tokens 0",
    "hybrid": "`hybrid`, 2048 tokens",
    "vllm-fcfs": "vLLM, fcfs",
    "vllm-priority": "vLLM, priority",
    "vllm-priority-256": "vLLM, priority, prefills cut to 256",
}
LONG_PREFILL_ROWS = {name: MIXED_LOAD_ROWS[name] for name in ("fcfs", "priority", "chunked", "layer", "qllm", "hybrid")}
PAPER_ROWS = {
    "qllm": "`qllm` (Algorithm 1 as printed)",
    "qllm-fill0": "`qllm`, fill_tokens 0",
    "priority": "`priority`, no preemption at all",
    "chunked": "`chunked`, no preemption at all",
    "layer": "`layer`",
    "hybrid": "`hybrid`",
}


def headline() -> str:
    """The README's only table: what was found, who says so, which script."""
    long = _long_prefill()
    ratios = load("paper")["to_fcfs"].set_index("policy")["LS TTFT ratio mean"]
    paper = load("paper")["paper"]["LS TTFT ratio mean"].iloc[0]
    mixed = load("mixed_load")["rows"].set_index("row")["ls_ttft_p99"]
    speed = load("throughput")["rows"].set_index("engine")["tokens_per_s"]
    held = load("validation")["held"].set_index("statistic")
    passes = load("sim_speed")["passes"].query("load == 'decoding'")["passes_per_s"]
    names = ("priority", "chunked", "layer", "qllm", "hybrid")
    p99 = ", ".join(f"`{name}` {_ms(long['p99 s'][name])}" for name in names)
    paid = ", ".join(f"`{name}` {_digits(long['BE turnaround s'][name])}" for name in ("fcfs", "qllm", "hybrid"))
    close = f"{held['followed']['mean']} of {held['of']['mean']}, {held['average']['mean']} at average speed"
    gain = ", ".join(f"`{name}` {ratios[name]:.0f}x" for name in ("qllm", "priority"))
    served = ", ".join(f"`{name}` {_ms(mixed[name])}" for name in ("qllm", "priority"))
    imported, modelled, measured = "simulated, imported", "simulated, modelled", "measured, two CPU cores"
    h200 = load("gpu")["figures"].set_index("figure")["value"]
    on_gpu = "measured, one H200"
    beside = f"{h200['ls_p99_qllm']:.2f}x `qllm`, {h200['ls_p99_hybrid']:.2f}x `hybrid`"
    speeds = f"{h200['tokens_per_s']:,.0f}, transformers {h200['tokens_per_s_transformers']:,.0f}"
    rows = [
        ("LS waits for a BE prefill of 8,192 tokens, p99, ms", f"{h200['blocking_8192']:.1f}", on_gpu, "gpu.py"),
        ("LS TTFT beside BE, p99, over TTFT alone", beside, on_gpu, "gpu.py"),
        ("tokens/s, 64 prompts at once", speeds, on_gpu, "gpu.py"),
        ("long BE prompts: LS TTFT, p99, ms", p99, imported, "ablation.py"),
        ("the same: BE turnaround, s", paid, imported, "ablation.py"),
        ("the paper's set-up: LS TTFT, `fcfs` over it", f"{gain}; paper {paper}x", modelled, "paper.py"),
        ("mixed load: LS TTFT, p99, ms", f"{served}, vLLM {_ms(mixed[BEST_VLLM])}", measured, "mixed_load.py"),
        ("tokens/s", f"{speed['qllm']:.0f}, vLLM {speed['vLLM']:.0f}", measured, "throughput.py"),
        ("simulated means within 5 % of a real run", close, "measured, one CPU thread", "fidelity/validate_cpu.py"),
        ("decode passes simulated per second", f"{passes.min():,.0f}", "measured, one CPU core", "sim_speed.py"),
    ]
    rows = [(*cells, f"`{script}`") for *cells, script in rows]
    return markdown(("what", "result", "source of times", "script"), rows)


def paper_rates() -> str:
    """What `make demo` prints, at two of its ten rates."""
    summary = load("paper")["summary"]
    ls = summary[summary["class"] == "ls"]
    rows = []
    for rate in (1, 7):
        at = ls[ls["rate"] == rate].set_index("policy")
        for name in ("fcfs", "priority", "chunked", "layer", "qllm", "qllm-fill0", "hybrid"):
            r = at.loc[name]
            cells = [f"{r['ttft_mean_s']:.3f}", f"{r['ttft_p99_s']:.3f}", f"{1e3 * r['tpot_mean_s']:.0f}"]
            cells += [f"{r['turnaround_mean_s']:.1f}", f"{r['slo_attainment']:.1%}", f"{r['throughput_rps']:.2f}"]
            rows.append((f"{rate}", f"`{name}`", *cells))
    columns = ("requests/s", "policy", "LS TTFT mean s", "p99 s", "TPOT ms", "turnaround s", "SLO met")
    columns += ("LS done/s of makespan",)
    return markdown(columns, rows, caption("paper"))


def paper() -> str:
    """The paper's five results beside ours."""
    found = load("paper")
    theirs, ours = found["paper"].iloc[0], found["to_fcfs"].set_index("policy")
    rows = [
        (
            "paper, measured on an A100",
            f"{theirs['LS TTFT ratio mean']}x, {theirs['max']}x",
            f"{theirs['rate within 3 s (mean)']:g}/s",
            f"{theirs['LS turnaround ratio max']}x",
            f"{theirs['BE turnaround mean']}x, {theirs['BE max']}x",
            theirs["throughput"],
        )
    ]
    for name, shown in PAPER_ROWS.items():
        r = ours.loc[name]
        rows.append(
            (
                shown,
                f"{r['LS TTFT ratio mean']:.0f}x, {r['max']:.0f}x",
                f"{r['rate within 3 s (mean)']:g}/s; {r['(p99)']:g}/s",
                f"{r['LS turnaround ratio max']:.1f}x",
                f"{r['BE turnaround mean']:.2f}x, {r['BE max']:.2f}x",
                f"{r['throughput min']:.2f}-{r['throughput max']:.2f}x",
            )
        )
    columns = (
        "",
        "LS TTFT lower by (mean, max)",
        "SLO of 3 s held up to (mean; p99)",
        "LS turnaround lower by, at most",
        "BE turnaround (mean, max)",
        "throughput",
    )
    return markdown(columns, rows, caption("paper"))


def long_prefill() -> str:
    """Long BE prompts at one rate, a row per policy."""
    rows = []
    for name, r in _long_prefill().loc[list(LONG_PREFILL_ROWS)].iterrows():
        cells = [f"{_ms(r['LS TTFT mean s'])}, {_ms(r['p99 s'])}", _digits(r["p99 / isolated"])]
        cells += [_digits(r["blocking p99 ms"]), f"{r['LS TPOT ms']:.0f}", _digits(r["BE turnaround s"])]
        rows.append((LONG_PREFILL_ROWS[str(name)], *cells, f"{r['req/s']:.3f}"))
    return markdown(
        (
            "policy",
            "LS TTFT mean, p99 (ms)",
            "p99 / isolated",
            "blocking p99 (ms)",
            "LS TPOT (ms)",
            "BE turnaround (s)",
            "requests/s",
        ),
        rows,
        caption("long_prefill"),
    )


def throughput() -> str:
    """Tokens per second of several engines."""
    rows = []
    for _, r in load("throughput")["rows"].iterrows():
        ratio = "-"
        if pd.notna(r["ratio"]) and r["engine"] != "qllm":
            ratio = f"{r['ratio']:.2f} ({r['ratio_lowest']:.2f}-{r['ratio_highest']:.2f})"
        speed = "-" if pd.isna(r["tokens_per_s"]) else f"{r['tokens_per_s']:.0f}"
        rows.append((r["engine"], speed, ratio))
    return markdown(("engine", "tokens/s", "qllm / it, run by run"), rows, caption("throughput"))


def mixed_load() -> str:
    """Long BE prompts beside short LS ones on the real engine, and on vLLM."""
    rows = []
    for _, r in load("mixed_load")["rows"].iterrows():
        ttft = " / ".join(_ms(r[f"ls_ttft_{name}"]) for name in STATISTICS)
        blocking = "-" if pd.isna(r["blocking_p99"]) else _ms(r["blocking_p99"])
        cells = [ttft, _digits(r["p99_to_alone"]), blocking, _ms(r["ls_tpot"]), f"{r['be_turnaround']:.0f}"]
        rows.append((MIXED_LOAD_ROWS[r["row"]], *cells, f"{r['requests_per_s']:.2f}"))
    return markdown(
        (
            "",
            "LS TTFT mean / p50 / p99 (ms)",
            "p99 / alone",
            "blocking p99 (ms)",
            "LS TPOT (ms)",
            "BE turnaround (s)",
            "requests/s",
        ),
        rows,
        caption("mixed_load"),
    )


def merging() -> str:
    """What shared expert queues buy."""
    rows = []
    for config in ("paper", "long_prefill"):
        for _, r in load("merging")[config].iterrows():
            cells = [f"{r['LS TTFT mean ms']:.1f}", f"{r['BE turnaround s']:.2f}", f"{r['over seeds s']:.2f}"]
            rows.append((f"{config}, {r['rate']:g}/s", r["policy"], *cells))
    columns = ("configuration", "policy", "LS TTFT mean (ms)", "BE turnaround (s)", "its deviation over seeds (s)")
    return markdown(columns, rows, caption("merging"))


def theory() -> str:
    """The simulator against queueing theory."""
    rows = []
    for _, r in load("theory")["rows"].iterrows():
        simulated = f"{r['simulated']:.2f} ± {r['interval']:.2f}"
        rows.append((r["queue"], r["load"], r["class"], f"{r['theory']:.2f}", simulated))
    return markdown(("queue", "load", "class", "theory (ms)", "simulated (ms)"), rows, caption("theory"))


def devices() -> str:
    """Fast device against step-by-step device, and engine against simulator."""
    found = load("devices")
    rows = [
        _same(f"{name}, both devices", mine) for name, mine in found["devices"].groupby("configuration", sort=False)
    ]
    rows.append(_same("engine and simulator", found["engine"]))
    return markdown(("compared", "policies", "passes", "suspensions", "identical schedules"), rows)


def _same(name: str, mine: pd.DataFrame) -> tuple[str, ...]:
    same = (mine["schedules"] == "identical").sum()
    return name, f"{len(mine)}", f"{mine['passes'].sum():,}", f"{mine['suspensions'].sum()}", f"{same} of {len(mine)}"


def _long_prefill() -> pd.DataFrame:
    found = load("long_prefill")["ablation"]
    return found[found["rate"] == RATE].set_index("policy")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def _digits(value: float) -> str:
    """Two digits at least, none after the point from 10 on."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1.95 else f"{value:.2f}".rstrip("0")


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        headline,
        paper_rates,
        paper,
        long_prefill,
        slack,
        slack_paper,
        slack_overload,
        slack_engine,
        three_classes,
        capacity,
        prefix_cache,
        gpu,
        latents,
        recurrent,
        nf4,
        throughput,
        mixed_load,
        server_load,
        server_batch,
        server_checks,
        merging,
        theory,
        devices,
        held,
        validation,
        validation_average,
        two_real_runs,
        held_out,
        held_out_box,
        roofline_gpus,
        roofline_traces,
    )
}
