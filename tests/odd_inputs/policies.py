"""Odd policies: files that do not import, and every question answered with nonsense, in the simulator and the engine.

The right answer: one line with the policy's file and the question, or all requests served in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import qllm.config.policies
from qllm.executor.errors import ExecutorError
from qllm.scheduler import Limits, Policy, SchedulerError
from tests.odd_inputs.cases import ACCEPTED, Case, both, command, expect, refusal, refused_by_command, simulated
from tests.odd_inputs.configurations import TIMINGS_TEXT, written

AREA = "policies"
STUCK_S = 1.0  # after which a call counts as stuck here; 5 s for users
HEAD = "import math, os, sys, time\nfrom qllm.scheduler import Policy\nclass Odd(Policy):\n    granularity = 'expert'\n"
QUESTIONS = {
    "level": "r",
    "order": "r",
    "select": "s, batch, now",
    "preempts": "s, running, now",
    "resume": "s, suspended, now",
    "recheck_at": "s, running, now",
}
ANSWERS = [
    *("None", "True", "0", "1", "-1", "0.5", "10**30", "-10**400", "math.nan", "math.inf", "-math.inf", "''"),
    *("'x'", "b'x'"),
    *("[]", "(1,)", "(math.nan,)", "(None,)", "('x', 1)", "{}", "object()", "Odd", "1j", "lambda: 0", "iter([1])"),
    "NotImplemented",
    *("1 / 0", "self.missing", "[][0]", "int('x')", "sys.exit(3)", "self.level(r)", "super().nothing()"),
    "(_ for _ in ()).throw(KeyError('k'))",
    "(_ for _ in ()).throw(RuntimeError('two\\nlines'))",
    *("(_ for _ in ()).throw(StopIteration())", "(_ for _ in ()).throw(MemoryError())"),
]  # fmt: skip
BODIES = {
    "level": [
        "return len(r.cls)",
        "r.priority = 'x'; return 0",
        "r.prompt_tokens = 10**9; return 0",
        "while True: pass",
    ],
    "order": [
        "return (r.prompt_tokens,)",
        "return (id(r),)",
        "return ('x',) if r.id % 2 else (1,)",
        "while True: pass",
    ],
    "select": [
        "pass",
        "return True",
        "batch.prefill(); batch.decode()",
        "batch.decode(); batch.prefill()",
        "batch.prefill(0)",
        "batch.prefill(-1)",
        "batch.prefill('x')",
        "batch.prefill(math.nan)",
        "batch.prefill(1.5)",
        "batch.prefill(None)",
        "batch.prefill(10**30)",
        "batch.decode(5)",
        "batch.nothing()",
        "batch.chunks.clear()",
        "batch.chunks.append(None)",
        "batch.prefill_tokens = 10**9; batch.prefill()",
        "s.waiting.clear()",
        "s.requests.clear()",
        "s.suspended_passes.clear(); batch.prefill() or batch.decode()",
        "s.waiting = []",
        "s.kv.free = -5; batch.prefill() or batch.decode()",
        "s.kv.take(10**9)",
        "s.next(now)",
        "s.add(next(iter(s.requests.values())), now)",
        "s.abort(next(iter(s.requests)), now); batch.prefill() or batch.decode()",
        "[s.abort(i, now) for i in list(s.requests)]",
        "batch.prefill() if now < 0.01 else None",
        "while True: pass",
        "time.sleep(1000)",
        "self.select(s, batch, now)",
    ],
    "preempts": [
        "return True",
        "return s.can_prefill(s.waiting.level())",
        "s.requests.clear(); return True",
        "while True: pass",
    ],
    "resume": ["return True", "return False", "s.suspended_passes.clear(); return False", "while True: pass"],
    "recheck_at": ["return now", "return now - 1", "return now + 1e-18", "return now + 1e-9", "while True: pass"],
}
PREEMPTING = "    def preempts(self, s, running, now):\n        return s.can_prefill(s.waiting.level())\n"
FILES = {
    "nothing": "",
    "no policy": "x = 1\n",
    "two policies": HEAD + "    pass\n\n\nclass Other(Policy):\n    pass\n",
    "only an imported policy": "from qllm.scheduler import Policy\n",
    "a syntax error": HEAD + "    def level(self, r:\n",
    "a tab": HEAD + "\tx = 1\n        y = 2\n",
    "an import that fails": "import nothing_of_that_name\n" + HEAD,
    "an exception": "raise ValueError('[red]x[/red]\\nsecond line')\n",
    "an exit": "import sys\nsys.exit(0)\n",
    "an interrupt": "raise KeyboardInterrupt\n",
    "a loop": "while True: pass\n",
    "a sleep": "import time\ntime.sleep(1000)\n",
    "endless recursion": "def f(): f()\nf()\n",
    "an argument without default": HEAD + "    def __init__(self, x): pass\n",
    "an __init__ that raises": HEAD + "    def __init__(self): raise OSError(5, 'x')\n",
    "an __init__ that loops": HEAD + "    def __init__(self):\n        while True: pass\n",
    "a __new__ of another": HEAD + "    def __new__(cls): return 5\n",
    "a __repr__ that raises": HEAD + "    def __repr__(self): raise ValueError\n    def level(self, r): return 'x'\n",
    "an abstract class": "from abc import abstractmethod\n" + HEAD + "    @abstractmethod\n    def f(self): pass\n",
    "questions that are values": HEAD + "    level = 5\n",
    "a question with other arguments": HEAD + "    def level(self): return 0\n",
    "a question that waits": HEAD + "    async def level(self, r): return 0\n",
    "a question that yields": HEAD + "    def select(self, s, batch, now): yield 5\n",
    "a static question": HEAD + "    @staticmethod\n    def level(r): return r.priority\n",
}
SERVED = {"a static question", "an abstract class"}
ATTRIBUTES = {
    "granularity": ["None", "5", "''", "'token'", "'EXPERT'", "['expert']", "'layer'", "'iteration'"],
    "merge": ["None", "'yes'", "5", "[]", "True"],
    "urgent": ["None", "'x'", "math.nan", "math.inf", "0.5", "-10**30", "10**30", "[]", "True"],
    "max_suspended_s": ["None", "'x'", "math.nan", "-1", "0", "1e-9", "math.inf", "[]", "True"],
}


def source(question: str, body: str) -> str:
    """A policy's file whose question has that body."""
    more = "" if question == "preempts" else PREEMPTING
    return HEAD + more + f"    def {question}(self, {QUESTIONS[question]}):\n        {body}\n"


def _sim_case(text: str, names: tuple[str, ...], must_fail: bool = False) -> str:
    Path("p.py").write_text(text)
    Path("t.csv").write_text(TIMINGS_TEXT)
    config = {
        "timings": "t.csv",
        "classes": {
            "ls": {"priority": 0, "share": 0.5, "prompt": {"fixed": 20}, "output": {"fixed": 3}},
            "be": {"priority": 1, "prompt": {"fixed": 60}, "output": {"fixed": 6}},
        },
        "rate": 2000,
        "requests": 8,
        "limits": {"max_seqs": 2, "max_batched_tokens": 64, "kv_blocks": 12},
        "policies": [{"file": "p.py"}],
    }
    with mock.patch.object(qllm.config.policies, "STUCK_S", STUCK_S):
        rows = simulated(written(config), names=names)
    if isinstance(rows, str):
        return rows
    expect(not must_fail, "accepted")
    both("requests", 8, len(rows))
    if "10**9" not in text:  # which makes prompts that large
        both("unserved", [], rows.loc[rows["status"] != "finished", "reason"].tolist())
    return ACCEPTED


@cache
def _model() -> tuple[Any, list[list[int]]]:
    """A tiny model, and the greedy answers to PROMPTS with a policy that ships."""
    from qllm.executor.engine.engine import Engine
    from qllm.executor.model.loading import prepare_model
    from qllm.executor.testing import tiny_model

    model = prepare_model(tiny_model("qwen3_moe"))
    with Engine(model, policy="fcfs", limits=LIMITS, seed=0) as engine:
        return model, [engine.submit(prompt, max_new_tokens=6, stop=[]).result().tokens for prompt in PROMPTS]


PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], [30] * 9]
LIMITS = Limits(max_seqs=2, max_batched_tokens=16, kv_blocks=12, block_size=4)


def _engine_case(text: str) -> str:
    """Requests with a policy that may break: each ends, with the right tokens or an error of one line."""
    from qllm.executor.engine.engine import Engine

    model, right = _model()
    space: dict[str, Any] = {"__name__": "odd"}
    try:
        exec(compile(text, "p.py", "exec"), space)
        policy: Policy = space["Odd"]()
        engine = Engine(model, policy=policy, limits=LIMITS, seed=0)
    except SchedulerError as error:
        return refusal(" ".join(str(error).split()))
    failed = ""
    with engine:
        streams = []
        for number, prompt in enumerate(PROMPTS):
            try:
                streams.append(engine.submit(prompt, max_new_tokens=6, priority=number % 2, stop=[]))
            except ExecutorError as error:
                failed = str(error)
        for stream in streams:
            try:
                result = stream.result()
            except (ExecutorError, SchedulerError) as error:
                failed = str(error)
                continue
            if result.finish_reason == "cancelled":  # the policy did that
                both("tokens", right[PROMPTS.index(stream.prompt)][: len(result.tokens)], result.tokens)
            else:
                both("tokens", right[PROMPTS.index(stream.prompt)], result.tokens)
    return refusal(" ".join(failed.split())) if failed else ACCEPTED


def _command_case(settings: dict[str, Any]) -> str:
    """An entry of `policies` that names its file oddly."""
    Path("p.py").write_text(HEAD + "    def __init__(self, size: int = 5): self.size = size\n")
    Path("t.csv").write_text(TIMINGS_TEXT)
    job = {"prompt": {"fixed": 20}, "output": {"fixed": 3}}
    config = {"timings": "t.csv", "classes": {"all": job}, "rate": 5, "requests": 2, "policies": [settings]}
    return refused_by_command(command("simulate", written(config)), "polic", "p.py")


def cases() -> Iterator[Case]:
    """All of them."""
    for name, text in FILES.items():
        if name != "an interrupt":
            yield Case(AREA, f"a file with {name}", partial(_sim_case, text, ("p.py",), name not in SERVED))
    for question in QUESTIONS:
        bodies = [f"return {answer}" for answer in ANSWERS] + BODIES[question]
        for body in bodies:
            text = source(question, body)
            yield Case(AREA, f"{question}: {body}", partial(_sim_case, text, ("p.py", "Odd", question)))
            if body != "s.waiting = []" and "while True" not in body and "sleep" not in body and "sys.exit" not in body:
                yield Case(AREA, f"{question} in an engine: {body}", partial(_engine_case, text))
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            text = HEAD + PREEMPTING + f"    {attribute} = {value}\n"
            yield Case(AREA, f"{attribute} = {value}", partial(_sim_case, text, ("p.py", "Odd", attribute)))
            yield Case(AREA, f"{attribute} = {value} in an engine", partial(_engine_case, text))
    for settings in (
        {"file": "missing.py"},
        {"file": "."},
        {"file": "/dev/null"},
        {"file": ""},
        {"file": "t.csv"},
        {"file": "p.py", "class": "Nobody"},
        {"file": "p.py", "class": ""},
        {"file": "p.py", "class": "Policy"},
        {"file": "p.py", "class": 5},
        {"file": "p.py", "name": "fcfs"},
        {"file": "p.py", "nothing": 5},
        {"file": "p.py", "self": 5},
        {"name": "fcfs", "class": "Odd"},
        {"class": "Odd"},
        {"name": "fcfs", "size": 5},
        {"name": "chunked", "budget": 0},
        {"name": "chunked", "budget": "x"},
        {"label": "x"},
        {},
    ):
        yield Case(AREA, f"policies: [{settings}]", partial(_command_case, settings))
