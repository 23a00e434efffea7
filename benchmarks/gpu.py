"""The engine on one GPU: every figure that it is to reach, with its goal, in one go.

    python benchmarks/gpu.py [--minutes 6] [--out DIR] [--parts NAME ...] [--tiny]

Random weights of the Qwen3-30B-A3B shape (48 layers, 128 experts, top 8, bfloat16, 61 GB), made on the device; fewer
layers where memory is short, with goals in proportion where a figure grows with the layers. Parts run in order of
importance, each in a share of the time (8 minutes are enough for all to the end). They run in a process of their own,
which is started anew after one that broke the device or gave no answer. DIR/gpu.json is written anew with each figure.

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

# ---- the process of the parts ----------------------------------------------------------------------------------


def serve(conn: Any, tiny: bool) -> None:
    """Run parts as they are asked for, (name, limit in seconds); answer with ("end", what went wrong or "")."""
    import torch
    from gpu_parts import checks, passes, serving
    from gpu_parts.world import NoTime, World, machine, one_line

    world = World(tiny, conn.send)
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
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
            except RuntimeError:  # after an illegal access no call of this process works
                usable = False
            conn.send(("end", told))


class Child:
    """The process of the parts."""

    def __init__(self, tiny: bool):
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, tiny), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, name: str, limit: float, take: Callable[..., None]) -> str:
        """What went wrong in that part, empty if nothing did. `take` gets what it tells."""
        end = time.monotonic() + limit + GRACE
        try:
            self._conn.send((name, limit))
            while self._conn.poll(max(0.0, end - time.monotonic())):
                kind, *what = self._conn.recv()
                if kind == "end":
                    return str(what[0])
                take(kind, *what)
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

    @property
    def alive(self) -> bool:
        return self._process.is_alive()


# ---- figures ---------------------------------------------------------------------------------------------------


class Report:
    """The figures so far, printed as they come and kept in a file."""

    def __init__(self, parts: Sequence[Part], path: Path | None):
        self._path = path
        self._facts: dict[str, Any] = {}
        self._figures = {figure.name: (part.name, figure) for part in parts for figure in part.figures}
        self._found: dict[str, tuple[float, str]] = {}
        self._parts = {part.name: {"part": part.name, "seconds": math.nan, "told": "not reached"} for part in parts}

    def take(self, kind: str, name: str, value: Any, note: str = "") -> None:
        """A fact about the run, or a figure."""
        if kind == "fact":
            self._facts[name] = value
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
        return "\n".join(map(self._line, self._figures))

    @property
    def bad(self) -> bool:
        """Whether a goal is missed, or a part failed."""
        return any(self._row(name)["verdict"] in ("missed", "failed") for name in self._figures)

    def _row(self, name: str) -> dict[str, Any]:
        part, figure = self._figures[name]
        told = str(self._parts[part]["told"])
        goal = figure.goal_for(self._facts.get("layers", LAYERS))
        value, note = self._found.get(name, (math.nan, "" if told == "done" else told))
        if math.isnan(value):
            verdict = "no time" if told.startswith(("no time", "not reached")) else "failed"
        elif goal is None:
            verdict = ""
        elif JUDGED not in str(self._facts.get("machine", {}).get("device")):
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
        layers = self._facts.get("layers", LAYERS)
        told = {} if layers == LAYERS else {"goals": f"{layers} of {LAYERS} layers: what grows with them in proportion"}
        device = self._facts.get("machine", {}).get("device", "no device")
        tables = {"figures": [*map(self._row, self._figures)], "parts": [*self._parts.values()]}
        save(self._path, source=f"measured on {device}", tables=tables, **self._facts, **told)


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
    child: Child | None = None
    for number, part in enumerate(parts):
        begin = time.monotonic()
        left, scale = until - begin, args.minutes / MINUTES
        if left < min(part.needs, part.share * scale):
            report.ended(part.name, 0.0, "no time")
            continue
        print(part.name, flush=True)
        if child is None or not child.alive:
            child = Child(args.tiny)
            if part is not BUILD:
                child.run(BUILD.name, BUILD.share, report.take)  # if it breaks, so does the part
        later = scale * sum(other.share for other in parts[number + 1 :])
        limit = BUILD.share if part is BUILD else max(part.share * scale, left - later)  # what others left over
        told = child.run(part.name, max(1.0, min(limit, until - time.monotonic())), report.take)
        report.ended(part.name, time.monotonic() - begin, told)
    if child is not None:
        child.stop()
    print(f"\n{report.table()}")
    sys.exit(report.bad)


if __name__ == "__main__":
    main()
