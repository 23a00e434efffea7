"""The tables of how far to trust simulator and step times."""

from __future__ import annotations

from figure_parts.markdown import markdown
from figure_parts.results import caption, load

METRICS = ("ttft", "tpot", "turnaround")
STATISTICS = ("mean", "p50", "p99")


def held() -> str:
    """How many errors of the simulation lie within the goals."""
    found = load("validation")
    twice = found["two_real_runs_held"].set_index("statistic")["share"]
    rows = []
    for _, r in found["held"].iterrows():
        real = f"{twice[r['statistic']]:.0%}" if r["statistic"] in twice.index else "-"
        shown = [f"{r[key]} of {r['of']}" for key in ("followed", "average")]
        rows.append((r["statistic"], f"{r['goal']:.0%}", *shown, real))
    columns = ("", "goal", "speed followed", "average speed", "two real runs")
    return markdown(columns, rows, caption("validation"))


def validation() -> str:
    """Simulated over real - 1, the machine's speed followed."""
    return _errors("followed")


def validation_average() -> str:
    """The same at each run's average speed."""
    return _errors("average")


def _errors(column: str) -> str:
    found = load("validation")
    errors = found["errors"].set_index(["policy", "rate", "metric", "statistic"])[column]
    rows = []
    for _, r in found["runs"].iterrows():
        cells = [", ".join(f"{errors[r['policy'], r['rate'], m, s]:+.1%}" for s in STATISTICS) for m in METRICS]
        stops = f"{r['preemptions_real']}, {r[f'preemptions_{column}']}"
        rows.append((r["policy"], f"{r['rate']:g}", *cells, f"{r[f'throughput_{column}']:+.1%}", stops))
    head = [f"{name} mean, p50, p99" for name in ("TTFT", "TPOT", "turnaround")]
    columns = ("policy", "requests/s", *head, "throughput", "preemptions real, simulated")
    return markdown(columns, rows, caption("validation"))


def two_real_runs() -> str:
    """How far two real runs of the same requests are apart."""
    found = load("validation")
    apart = found["two_real_runs"]
    value = apart.set_index(["policy", "rate", "metric", "statistic"])["difference"]
    rows = []
    for policy, rate in apart[["policy", "rate"]].drop_duplicates().itertuples(index=False):
        cells = [", ".join(f"{value[policy, rate, m, s]:.1%}" for s in STATISTICS) for m in METRICS]
        rows.append((policy, f"{rate:g}", *cells))
    told = found["provenance"]
    source = f"{told['source'][0].upper()}{told['source'][1:]} (`{told['repeat']}`, {told['date']})."
    head = [f"{name} mean, p50, p99" for name in ("TTFT", "TPOT", "turnaround")]
    return markdown(("policy", "requests/s", *head), rows, source)


def held_out() -> str:
    """Imported step times, predicted from the rest."""
    rows = load("held_out")["rows"].itertuples(index=False)
    return markdown(("what is left out", "MAPE", "largest"), rows, caption("held_out"))


def held_out_box() -> str:
    """The same for each GPU that ships, under even and uneven loads."""
    rows = (map(str, row) for row in load("held_out_box")["rows"].itertuples(index=False))
    columns = ("GPU", "kernels", "even load, one row left out", "power law 1.01", "power law 1.2", "largest")
    return markdown((*columns, "passes by one framework alone"), [list(row) for row in rows], caption("held_out_box"))


def roofline_gpus() -> str:
    """Traces modelled from data sheets against imported ones, by GPU."""
    rows = load("roofline")["gpus"].itertuples(index=False)
    cells = [(gpu, used, str(n), f"{mean:.0%}", f"{largest:.0%}") for gpu, used, n, mean, largest in rows]
    columns = ("GPU", "its traces were", "traces", "passes off by, mean", "largest")
    return markdown(columns, cells, caption("roofline"))


def roofline_traces() -> str:
    """The same, trace by trace."""
    found = load("roofline")["traces"]
    passes = [column for column in found.columns if column.startswith(("decode", "prefill"))]
    cells = [(row["trace"], *(f"{row[name]:+.0%}" for name in passes)) for _, row in found.iterrows()]
    return markdown(("trace", *passes), cells, caption("roofline"))
