"""A sample of the odd inputs of tests/odd_inputs, and all of them in the slow run."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from qllm.config.config import load_config
from qllm.experiment.folders import claim
from qllm.experiment.results import load_results, write_config
from qllm.scheduler import Limits, Policy, PolicyError, Request, Scheduler, SchedulerError, UnknownPolicy, make_policy
from qllm.sim import simulate
from qllm.traces.requests.generate import generate
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.trace import RequestTrace, TraceError
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import write_config as small_config
from tests.odd_inputs import all_cases
from tests.odd_inputs.cases import ACCEPTED, REFUSED, Case, Fault, run_all


def faults(cases, **settings) -> list[str]:
    return [f"{a.case.area}: {a.case.name}: {a.outcome}" for a in run_all(cases, **settings) if a.wrong]


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("torch")
    return all_cases()


def test_there_are_many_cases_each_of_its_own(cases):
    assert len({(case.area, case.name) for case in cases}) > 5000
    assert {case.area for case in cases} == {
        *("YAML", "command line", "request traces", "timing traces", "policies", "engine")
    }


def answered(*options: str) -> str:
    """The table of `python -m tests.odd_inputs`, which forks: not from a process of tests, with threads and locks."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "tests.odd_inputs", "--hang", "60", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sample_is_answered_rightly():
    # Loops take seconds each, until they are stopped.
    table = answered("--share", "0.02", "--seed", "7", "--without", "while True", "sleep", "loop")
    assert int(re.search(r"^all +(\d+)", table, re.MULTILINE)[1]) > 100


@pytest.mark.slow
def test_all_are_answered_rightly():
    answered()


def test_each_kind_of_fault_is_found():
    def silent() -> str:
        raise Fault("another answer")

    def dies() -> str:
        import os

        os._exit(3)

    def hangs() -> str:
        import time

        time.sleep(60)
        return ACCEPTED

    wrong = [Case("x", "raises", lambda: str(1 / 0)), Case("x", "silent", silent), Case("x", "dies", dies)]
    found = faults([*wrong, Case("x", "hangs", hangs), Case("x", "right", lambda: REFUSED)], hang_s=3.0)
    assert len(found) == 4
    for words in (
        "raises: fault: ZeroDivisionError",
        "silent: fault: another answer",
        "code 3",
        "no answer within 3 s",
    ):
        assert any(words in line for line in found)


def test_priorities_and_lengths_of_numpy_are_served(one_thread):
    from qllm.executor.engine.engine import Engine
    from tests.engine_worlds import make_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        engine = Engine(make_model(), limits=Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=64), seed=np.int64(3))
    with engine:
        plain = engine.submit([5, 6, 7], max_new_tokens=3, priority=1).result().tokens
        odd = engine.submit([5, 6, 7], max_new_tokens=np.int32(3), priority=np.int64(1), temperature=np.float32(0))
        assert odd.result().tokens == plain
    for name in ("policy", "limits", "kv_memory", "max_step", "seed"):
        with pytest.raises(Exception, match=f"{name} is 'nonsense'|unknown policy|one of fcfs"):
            Engine(engine.model, **{name: "nonsense"})
    with pytest.raises(SchedulerError, match="policy is 5"):
        Engine(engine.model, policy=5)


@pytest.mark.parametrize(
    ("name", "value"), [("granularity", "token"), ("merge", "yes"), ("urgent", None), ("max_suspended_s", float("nan"))]
)
def test_attributes_of_a_policy_are_checked_wherever_it_comes_from(name, value):
    policy = type("Odd", (Policy,), {name: value})()
    with pytest.raises(UnknownPolicy, match=f"policy Odd: {name} is "):
        Scheduler(policy, Limits())


def test_a_question_within_a_question_is_told_once():
    class Asks(Policy):
        def select(self, s, batch, now):
            s.next(now)

    scheduler = Scheduler(Asks(), Limits())
    scheduler.add(Request(0, 5, 2), 0.0)
    with pytest.raises(PolicyError) as told:
        scheduler.next(0.0)
    assert len(str(told.value)) < 400


def test_settings_in_tokens_are_whole_numbers():
    for name, key in (("chunked", "budget"), ("qllm", "fill_tokens")):
        with pytest.raises(UnknownPolicy, match=f"{key} is 2.5, must be a whole number"):
            make_policy(name, **{key: 2.5})


def test_a_policy_that_takes_requests_out_of_a_simulation_is_told():
    class Aborts(Policy):
        def select(self, s, batch, now):
            for one in list(s.requests):
                s.abort(one, now)

    trace = RequestTrace(np.zeros(2), np.array([5, 5]), np.array([2, 2]), np.zeros(2, dtype=np.int64))
    steps = PassCostModel(affine_timings())
    with pytest.raises(SchedulerError, match="2 requests have not ended"):
        simulate(trace, priorities={"all": 0}, policy=Aborts(), limits=Limits(), steps=steps)


def test_traces_that_are_taken_for_others(tmp_path):
    own = tmp_path / "own.json"
    own.write_text('[{"arrival_s": 1.5, "prompt_tokens": 5, "output_tokens": 2}]')
    with pytest.raises(TraceError, match="entry 1: has the key arrival_s"):
        read_requests(own)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="not a regular file"):
        read_requests(tmp_path / "pipe")
    recipe = {"prompt": {"fixed": 5}, "output": {"fixed": 2}}
    with pytest.raises(TraceError, match="requests: 10000000000 must be"):
        generate(recipe, rate=5.0, requests=10**10, seed=0)
    with pytest.raises(TraceError, match="rate: at 1e-320"):
        generate(recipe, rate=1e-320, requests=3, seed=0)


def test_the_same_configuration_may_use_its_folder_again(tmp_path):
    path = small_config(tmp_path)
    path.write_text(path.read_text().replace("seeds: 2\n", ""))
    config = load_config(path)
    folder = claim(tmp_path / "out", config, "simulation")
    write_config(config.model_copy(update={"provenance": {"timings": "x"}}), folder)
    assert claim(folder, load_config(path), "simulation") == folder


def test_a_table_of_something_else_is_no_result(tmp_path):
    import pandas as pd

    write_config(load_config(small_config(tmp_path)), tmp_path)
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "requests.parquet")
    with pytest.raises(ValueError, match="holds no requests of a simulation"):
        load_results(tmp_path)
