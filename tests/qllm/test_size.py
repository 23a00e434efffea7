"""Runs too large are estimated and refused before they begin; long ones say how far they are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from qllm.experiment import progress as progress_of
from qllm.experiment import size, sweep
from qllm.experiment.run import run_table, runs
from qllm.experiment.size import check_engine_size, check_size
from qllm.experiment.sweep import simulate
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import CONFIG, qllm, write_config

ONE = ["sweep.rate=[5]", "seeds=1"]
HUGE = {
    "requests": (["requests=1000000000"], r"GB of memory .*1,000,000,000 requests of policy fcfs at rate=5, seed=0"),
    "duration": (["requests=null", "duration=1e12"], r"GB of memory .*5,000,000,000,000 requests"),
    "rate": (["requests=null", "duration=100", "sweep.rate=[1e12]"], r"GB of memory"),
    "prompts": (["classes.be.prompt=100000000000", "limits.kv_blocks=9007199254740991"], r"hours on 1 processes"),
    "outputs": (["classes.be.output=1000000000"], r"hours on 1 processes"),
    "many runs": (["seeds=1000", "sweep.rate=[1, 2, 3]", "requests=20000"], r"hours on"),
    "chunks of one": (
        [
            "classes.be.prompt=10000000",
            "limits.kv_blocks=100000000",
            "limits.max_batched_tokens=1",
            "limits.max_seqs=1",
        ],
        r"hours on 1 processes",
    ),
}


@pytest.mark.parametrize("kind", HUGE)
def test_what_is_too_large_is_refused_before_it_begins(kind: str, tmp_path: Path) -> None:
    overrides, expected = HUGE[kind]
    huge = {"prompts": ["limits.kv_blocks=9007199254740991"], "outputs": ["limits.kv_blocks=9007199254740991"]}
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{expected}.*; allowed: .*; or --any-size") as caught:
        simulate(write_config(tmp_path), set=[*ONE, *overrides, *huge.get(kind, [])])
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)


def test_a_model_without_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(tmp_path)
    monkeypatch.setattr(size, "memory_bytes", lambda: 16e9)
    affine_timings(layers=2_000_000, experts=8, top_k=2, hidden=64).save(tmp_path / "timings.csv")
    with pytest.raises(ConfigError, match=r"GB of memory .*timings: a model of 1.6e\+07 experts in all"):
        simulate(path, set=ONE)


def test_any_size_runs_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(tmp_path)
    monkeypatch.setattr(size, "MOST_S", 0.0)
    with pytest.raises(ConfigError, match=r"1 simulations take more than"):
        simulate(path, set=[*ONE, "policies=[fcfs]"])
    assert len(simulate(path, set=[*ONE, "policies=[fcfs]"], any_size=True).requests) == 40
    done = simulate(path, set=ONE, any_size=True, keep=tmp_path / "points")
    assert simulate(path, set=ONE, keep=tmp_path / "points").requests.equals(done.requests)  # nothing is left to run


def test_the_estimate_is_near_the_truth(tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIG.replace("requests: 40", "requests: 2000"))
    todo = runs(load_config(path, ONE))
    run_table(todo[0])  # files are read
    began = time.process_time()
    for run in todo:
        run_table(run)
    took = time.process_time() - began
    estimated = sum(size.run_seconds(run) for run in todo)
    assert took / 10 < estimated < took * 10  # of any machine


def test_prompts_that_fit_nowhere_take_no_time(tmp_path: Path) -> None:
    rows = simulate(write_config(tmp_path), set=[*ONE, "classes.be.prompt=100000000000"]).requests
    assert set(rows.loc[rows["class"] == "be", "status"]) == {"rejected"}
    assert rows.loc[rows["class"] == "be", "isolated_ttft_s"].isna().all()
    assert rows.loc[rows["class"] == "ls", "isolated_ttft_s"].notna().all()


def test_arrivals_that_no_clock_tells_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rate: the last request arrives after .* s; allowed: 1e\+08 s"):
        simulate(write_config(tmp_path), set=["sweep.rate=[1e-300]", "seeds=1"])


def test_runs_on_the_engine_take_at_least_their_arrivals(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    check_engine_size(runs(load_config(path)))
    with pytest.raises(ConfigError, match=r"more than 2\.\d+ hours for the arrivals alone"):
        check_engine_size(runs(load_config(path, [*ONE, "requests=40000"])))


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = size.memory_bytes()
    assert machine > 1e8
    (tmp_path / "limit").write_text("10000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(size, "CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "limit", tmp_path / "nowhere"))
    assert size.memory_bytes() == 1e4
    with pytest.raises(ConfigError, match="GB of memory with 1 processes"):
        check_size(todo := runs(load_config(write_config(tmp_path))), todo, 1)


def test_without_a_terminal_a_line_every_few_seconds_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_of, "EVERY_S", 0.02)
    with progress_of.progress("measuring") as update:
        update(3, None)
        time.sleep(0.2)
        update(4, 9)
        time.sleep(0.2)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "measuring: 3 done after 0 s"
    assert told[-1] == "measuring: 4 of 9 done after 0 s"
    real = sweep.attempt
    monkeypatch.setattr(sweep, "attempt", lambda *task: (time.sleep(0.1), real(*task))[1])
    simulate(write_config(tmp_path), set=ONE, progress=True)
    assert "simulating: 1 of 2 done after 0 s" in capsys.readouterr().err


def test_what_another_thread_has_done_is_asked_for_and_another_phase_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_of, "EVERY_S", 0.02)
    with progress_of.progress("loading") as update:
        update.phase("running", 7)
        assert capsys.readouterr().err.splitlines()[-1] == "running"
        update.watch(lambda: 5)
        time.sleep(0.2)
    assert capsys.readouterr().err.splitlines()[-1] == "running: 5 of 7 done after 0 s"
    update.phase("afterwards")
    assert capsys.readouterr().err == ""


def test_a_bar_follows_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_of, "BAR_EVERY_S", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    told = []
    monkeypatch.setattr(progress_of.Progress, "update", lambda *_, **values: told.append(values))
    monkeypatch.setattr(progress_of.Progress, "reset", lambda *_, **values: told.append(values))
    with progress_of.progress("loading") as update:
        update(1, 2)
        update.phase("running", 7)
        update.watch(lambda: 5)
        time.sleep(0.2)
    assert {"completed": 1, "total": 2} in told
    assert {"description": "running", "total": 7} in told
    assert told[-1] == {"completed": 5, "total": 7}


def test_nothing_is_said_where_nobody_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(write_config(tmp_path), set=ONE)
    assert capsys.readouterr().err == ""


def test_too_large_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    done = qllm("simulate", write_config(tmp_path), "--out", tmp_path / "out", "--set", "requests=1000000000")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "--any-size" in done.stderr
