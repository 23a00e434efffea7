"""Odd inputs to everything that takes any: thousands of cases, each of which says what its answer must be.

    python -m tests.odd_inputs [AREA ...] [--share 0.1] [--seed 0] [--only TEXT] [--without TEXT ...]

The right answer to an odd input is one line (exit code 2, no traceback, at most 400 characters, the file, key, row or
option named), or what an independent reckoning says: the plain input's answer, the reference of keys, properties of the
result. A case that takes longer than 10 s is a fault. Exit code 1 where there is any.

The kinds, and where each is guarded:

    configurations   each key of the models with each odd value, set and swept: the models of qllm/config/schema.py and
                     traces/requests/recipe.py (`StrictModel`), one line by `explain`; YAML that is broken, too large,
                     doubled or in itself: qllm/config/yaml_lines.py; too much work: qllm/experiment/size.py
    command_line     files of another kind: traces/files.py; folders of others: qllm/experiment/folders.py; results that
                     were touched: qllm/experiment/results.py; all else: qllm/cli, where `main` makes one line of it
    request_traces   cells, rows, encodings: traces/requests/_read_csv.py, _read_json.py; units: _time_units.py;
                     recipes: recipe.py, generate.py
    timing_traces    headers: traces/comment_header.py, `check_header` of traces/step_times/file_format.py; points:
                     `check_points` there; what no GPU can do: roofline.py
    policies         files: qllm/config/policies.py, which also stops loops; answers and attributes: `ask` and
                     `checked_policy` of scheduler/policy.py; requests that nobody serves: sim/simulate.py
    engine           arguments: executor/engine/checks.py and `SamplingParams` of params.py; limits:
                     scheduler/memory.py
"""

from __future__ import annotations

import argparse
import importlib
import random
from collections import Counter
from collections.abc import Sequence

from tests.odd_inputs.cases import ACCEPTED, HANG_S, REFUSED, Answer, Case, run_all

AREAS = ("configurations", "command_line", "request_traces", "timing_traces", "policies", "engine")


def all_cases(areas: Sequence[str] = AREAS) -> list[Case]:
    """Every case of these areas, always in the same order."""
    return [case for area in areas for case in importlib.import_module(f"tests.odd_inputs.{area}").cases()]


def chosen(cases: Sequence[Case], share: float, seed: int) -> list[Case]:
    """A random share of the cases."""
    rng = random.Random(seed)
    return [case for case in cases if rng.random() < share]


def table(answers: Sequence[Answer]) -> str:
    """Area, cases, refused, accepted, faults."""
    rows = [f"{'area':<16} {'cases':>6} {'refused':>8} {'accepted':>9} {'faults':>7}"]
    for area in [*dict.fromkeys(answer.case.area for answer in answers), ""]:
        mine = [answer for answer in answers if area in ("", answer.case.area)]
        count = Counter("fault" if answer.wrong else answer.outcome for answer in mine)
        rows.append(f"{area or 'all':<16} {len(mine):>6} {count[REFUSED]:>8} {count[ACCEPTED]:>9} {count['fault']:>7}")
    return "\n".join(rows)


def main() -> int:
    """The command: 1 where there is a fault."""
    parser = argparse.ArgumentParser(description="Odd inputs and what they are answered.")
    parser.add_argument("areas", nargs="*", help=f"of {', '.join(AREAS)}; default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--without", nargs="+", default=[], help="no cases whose name holds one of these")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hang", type=float, default=HANG_S, help="seconds that no case may take")
    given = parser.parse_args()
    some = chosen(all_cases(given.areas or AREAS), given.share, given.seed)
    some = [case for case in some if given.only in case.name and not any(word in case.name for word in given.without)]
    answers = []
    for answer in run_all(some, given.processes, given.hang):
        answers.append(answer)
        if answer.wrong:
            print(f"{answer.case.area}: {answer.case.name}: {answer.outcome}", flush=True)
    print(table(answers))
    for slow in sorted(answers, key=lambda answer: -answer.seconds)[:1]:
        print(f"slowest: {slow.seconds:.1f} s, {slow.case.name}")
    return 1 if any(answer.wrong for answer in answers) else 0
