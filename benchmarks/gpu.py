"""The engine on one GPU: every figure that it is to reach, with its goal, in one go.

    python benchmarks/gpu.py [--minutes 6] [--out DIR] [--parts NAME ...] [--tiny]

Random weights of the Qwen3-30B-A3B shape (48 layers, 128 experts, top 8, bfloat16, 61 GB), made on the device; fewer
layers where memory is short, with goals in proportion where a figure grows with the layers. Parts run in order of
importance, each in a share of the time (8 minutes are enough for all to the end). They run in a process of their own,
which is started anew where one broke the device or gave no answer, without graphs where they did. DIR/gpu.json is
written anew with each figure.

Goals are those for an NVIDIA H200; on other devices they are shown and not judged. Exit code 1: a goal is missed, or a
part failed. `--tiny` runs everything on a CPU, with two small layers, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts.figures import JUDGED, LAYERS, MINUTES, PARTS, Part
from results_file import save

GRACE = 30.0  # seconds beyond its limit, after which a part has no answer
BUILD = PARTS[0]
NO_GPU = "no GPU is there; --tiny runs on a CPU"

# ---- the process of the parts ----------------------------------------------------------------------------------


def serve(conn: Any, tiny: bool, graphs: bool) -> None:
    """Run parts as they are asked for, (name, limit in seconds); answer with ("end", what went wrong or "", usable)."""
    import torch
    from gpu_parts import checks, passes, serving
    from gpu_parts.world import NoTime, World, machine, one_line

    if not (tiny or torch.cuda.is_available()):
        conn.send(("end", NO_GPU, False))
        return
    world = World(tiny, graphs, conn.send)
    world.fact("machine", machine(world.device))
    if tiny:
        world.fact("sizes", "tiny: what the figures are called is not what ran")
    usable = True
    with suppress(EOFError):
        while usable:
            name, limit = conn.recv()
            world.until = time.monotonic() + limit
            told = ""
            try:
                next(getattr(module, name) for module in (passes, serving, checks) if hasattr(module, name))(world)
            except NoTime as error:
                told = " ".join(f"no time {error}".split())
            except Exception as error:
                told = one_line(error)
                world.fact(f"{name} failed", told)  # before what may find no end
                with suppress(RuntimeError):
                    world.close()
            try:
                world.tidy()
            except RuntimeError:  # after an illegal access no call of this process works
                usable = False
            conn.send(("end", told, usable))


class Child:
    """The process of the parts."""

    def __init__(self, tiny: bool, graphs: bool = True):
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, tiny, graphs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, name: str, limit: float, take: Callable[..., None]) -> str:
        """What went wrong in that part, empty if nothing did. `take` gets what it tells."""
        end = time.monotonic() + limit + GRACE
        try:
            self._conn.send((name, limit))
            while self._conn.poll(max(0.0, end - time.monotonic())):
                kind, *what = self._conn.recv()
                if kind != "end":
                    take(kind, *what)
                    continue
                told, usable = what
                if not usable:
                    self.stop()
                return str(told)
        except (EOFError, OSError):
            self._process.join(10)
            return f"its process ended with exit code {self._process.exitcode}"
        self._process.kill()
        self._process.join()
        return f"no answer after {limit + GRACE:.0f} s"

    def stop(self) -> None:
        self._conn.close()
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()


def built(tiny: bool, graphs: bool, report: Report, until: float) -> tuple[Child, str]:
    """A process with model and engine, and what went wrong with these; without graphs where those break it."""
    child = Child(tiny, graphs)
    told = child.run(BUILD.name, min(BUILD.share, max(1.0, until - time.monotonic())), report.take)
    if child.alive or told == NO_GPU or not graphs:
        return child, told
    report.take("fact", "graphs", f"off, since with them: {told}")
    return built(tiny, False, report, until)


# ---- figures ---------------------------------------------------------------------------------------------------


class Report:
    """The figures so far, printed as they come and kept in a file."""

    def __init__(self, parts: Sequence[Part], path: Path | None):
        self._path = path
        self.facts: dict[str, Any] = {}
        self._figures = {figure.name: (part.name, figure) for part in parts for figure in part.figures}
        self._found: dict[str, tuple[float, str]] = {}
        self._parts = {part.name: {"part": part.name, "seconds": math.nan, "told": "not reached"} for part in parts}

    def take(self, kind: str, name: str, value: Any, note: str = "") -> None:
        """A fact about the run, or a figure."""
        if kind == "fact":
            self.facts[name] = value
            print(f"  {name}: {value}", flush=True)
        elif name in self._figures:
            self._found[name] = (value, note)
            print(f"  {self._line(name)}", flush=True)
        self._save()

    def ended(self, part: str, seconds: float, told: str) -> None:
        self._parts[part] |= {"seconds": seconds, "told": told or "done"}
        print(f"  {part}: {told or 'done'} ({seconds:.1f} s)", flush=True)
        self._save()

    def table(self) -> str:
        head = f"{'':33} {'value':>9} {'unit':8} {'goal':9} {'verdict':10} note"
        return "\n".join([head, *map(self._line, self._figures)])

    @property
    def bad(self) -> bool:
        """Whether a goal is missed, or a part failed."""
        return any(self._row(name)["verdict"] in ("missed", "failed") for name in self._figures)

    def _row(self, name: str) -> dict[str, Any]:
        part, figure = self._figures[name]
        told = str(self._parts[part]["told"])
        goal = figure.goal_for(self.facts.get("layers", LAYERS))
        value, note = self._found.get(name, (math.nan, "" if told == "done" else told))
        if math.isnan(value):
            verdict = "no time" if told.startswith(("no time", "not reached")) else "failed"
        elif goal is None:
            verdict = ""
        elif JUDGED not in str(self.facts.get("machine", {}).get("device")):
            verdict = "not judged"
        else:
            verdict = "pass" if figure.reached(value, goal) else "missed"
        row = {"figure": name, "what": figure.title, "value": value, "unit": figure.unit}
        aim = "" if goal is None else f"{'>=' if figure.least else '<='} {goal:.4g}"
        return {**row, "goal": aim, "verdict": verdict, "note": note}

    def _line(self, name: str) -> str:
        row = self._row(name)
        number = "-" if math.isnan(row["value"]) else f"{row['value']:.5g}"
        cells = f"{row['what']:33} {number:>9} {row['unit']:8} {row['goal']:9} {row['verdict']:10} {row['note']}"
        return cells.rstrip()

    def _save(self) -> None:
        if self._path is None:
            return
        layers = self.facts.get("layers", LAYERS)
        told = {} if layers == LAYERS else {"goals": f"{layers} of {LAYERS} layers: what grows with them in proportion"}
        device = self.facts.get("machine", {}).get("device", "no device")
        tables = {"figures": [*map(self._row, self._figures)], "parts": [*self._parts.values()]}
        save(self._path, source=f"measured on {device}", tables=tables, **self.facts, **told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write gpu.json into this folder")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS[1:]], help="these alone")
    parser.add_argument("--tiny", action="store_true", help="two small layers, on the CPU")
    args = parser.parse_args()
    parts = [part for part in PARTS if args.parts is None or part is BUILD or part.name in args.parts]
    until = time.monotonic() + 60 * args.minutes
    report = Report(parts, args.out and args.out / "gpu.json")
    scale = args.minutes / MINUTES
    child, told = built(args.tiny, True, report, until)
    report.ended(BUILD.name, time.monotonic() - until + 60 * args.minutes, told)
    for number, part in enumerate(parts[1:], start=2):
        begin = time.monotonic()
        if told == NO_GPU or until - begin < min(part.needs, part.share * scale):
            report.ended(part.name, 0.0, "no time" if told != NO_GPU else told)
            continue
        print(part.name, flush=True)
        if not child.alive:
            child, _ = built(args.tiny, "graphs" not in report.facts, report, until)  # if it breaks, so does the part
        left, later = until - time.monotonic(), scale * sum(other.share for other in parts[number:])
        limit = max(part.share * scale, left - later)  # with what others left over
        why = child.run(part.name, max(1.0, min(limit, left)), report.take)
        report.ended(part.name, time.monotonic() - begin, why)
    child.stop()
    print(f"\n{report.table()}")
    sys.exit(report.bad)


if __name__ == "__main__":
    main()
