"""Sweeps that were interrupted, that partly fail, and that run elsewhere."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import joblib
import pandas as pd
import pytest

from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from qllm.errors import SweepError
from qllm.experiment import cache
from qllm.experiment.backends import parallel
from qllm.experiment.cache import keys
from qllm.experiment.results import REQUESTS, load_results
from qllm.experiment.run import Run, runs
from qllm.experiment.sweep import simulate
from qllm.traces.requests.quantile_table import bundled_lengths
from qllm.traces.step_times.popularity import bundled_popularity
from qllm.traces.step_times.timings import bundled_timings
from tests.cli_support import CONFIG, qllm, write_config

RUNS = 8  # of CONFIG: two rates, policies and seeds

FAILS_AT_50 = """\
from qllm.scheduler import Policy

class Mine(Policy):
    def level(self, r):
        if r.arrival < 0.01 and r.id == 1:
            raise ValueError("too fast")
        return r.priority
"""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The simulations that were run, in order; the fifth is interrupted if `stop` is put in front."""
    ran: list[str] = []
    real = cache.run_table

    def run_table(run: Run) -> pd.DataFrame:
        if ran[:1] == ["stop"] and len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(str(run))
        return real(run)

    monkeypatch.setattr(cache, "run_table", run_table)
    return ran


def test_an_interrupted_sweep_goes_on_and_runs_nothing_twice(tmp_path: Path, counted: list[str]) -> None:
    config = write_config(tmp_path)
    whole = simulate(config)
    every = list(counted)
    assert len(set(every)) == RUNS
    counted[:] = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        simulate(config, keep=tmp_path / "points")
    assert len(list((tmp_path / "points").iterdir())) == 4
    del counted[0]
    resumed = simulate(config, keep=tmp_path / "points")
    assert counted == every  # four before, four after
    first, second = whole.save(tmp_path / "whole"), resumed.save(tmp_path / "resumed")
    assert (first / REQUESTS).read_bytes() == (second / REQUESTS).read_bytes()


def test_only_what_is_new_is_run(tmp_path: Path, counted: list[str]) -> None:
    config, keep = write_config(tmp_path), tmp_path / "points"
    simulate(config, keep=keep)
    counted.clear()
    more = ["sweep.rate=[5, 20, 50]", "policies=[priority, {name: fcfs, label: tgi}]", "classes.ls.slo.ttft=0.5"]
    results = simulate(config, set=more, keep=keep)
    assert sorted(counted) == [
        *(f"policy priority at rate={rate}, seed={seed}" for rate in (20, 5, 50) for seed in (0, 1)),
        *(f"policy tgi at rate=20, seed={seed}" for seed in (0, 1)),
    ]
    pd.testing.assert_frame_equal(results.requests, simulate(config, set=more).requests)


def test_a_damaged_file_is_run_again(tmp_path: Path, counted: list[str]) -> None:
    config, keep = write_config(tmp_path), tmp_path / "points"
    simulate(config, keep=keep)
    one, other, *_ = sorted(keep.iterdir())
    one.write_bytes(one.read_bytes()[:100])
    other.write_bytes(b"")
    counted.clear()
    results = simulate(config, keep=keep)
    assert len(counted) == 2
    assert len(results.requests) == RUNS * 40


@pytest.mark.parametrize(
    "change",
    [
        ["seeds=[2, 3]"],
        ["requests=41"],
        ["limits.max_seqs=7"],
        ["max_step=0.001"],
        ["classes.be.output.fixed=11"],
        ["classes.be.priority=2"],
        ["policies=[{name: qllm, fill_tokens: 1}, layer]"],
        ["timings=other.csv"],
    ],
)
def test_what_a_simulation_depends_on_is_in_its_name(change: list[str], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "other.csv").write_text((tmp_path / "timings.csv").read_text().replace("e-05", "e-06"))
    before, after = (keys(runs(load_config(config, overrides))) for overrides in ([], change))
    assert len(set(before)) == RUNS
    assert not set(before) & set(after)


def test_files_count_by_content_and_labels_do_not(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILS_AT_50)
    config = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    before = keys(runs(load_config(config)))
    assert keys(runs(load_config(config, ["policies.0.label=other", "name=other"]))) == before
    (tmp_path / "mine.py").write_text(FAILS_AT_50 + "# changed\n")
    changed = keys(runs(load_config(config)))
    assert [one == other for one, other in zip(before, changed, strict=True)] == 2 * [False, False, True, True]


def test_all_code_that_a_simulation_runs_is_in_its_name(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code = f"""
import sys
from qllm.config.config import load_config
from qllm.experiment.cache import finish, source_files
from qllm.experiment.run import runs
finish(runs(load_config({str(config)!r}))[0])
loaded = {{module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "qllm"}}
print(*sorted(loaded - {{str(path) for path in source_files()}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == [], done.stderr
    shipped = {path.stem for path in cache.source_files() if path.suffix == ".csv"}
    assert {*bundled_timings(), *bundled_popularity(), *bundled_lengths()} <= shipped


def test_fresh_runs_everything_again(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arguments = ["simulate", config, "--out", tmp_path / "out", "--jobs", 1]
    assert qllm(*arguments).returncode == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "points").iterdir()}
    assert qllm(*arguments).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert qllm(*arguments, "--fresh").returncode == 0
    assert all(path.stat().st_mtime_ns > before for path, before in files.items())


def test_a_failed_simulation_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILS_AT_50)
    config = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}").replace("50]", "5000]"))
    done = qllm("simulate", config, "--out", tmp_path / "out", "--jobs", 2, "--timeline")
    assert done.returncode == 1
    assert done.stderr.startswith("warning: 2 of 8 simulations failed")
    assert "Traceback" not in done.stderr
    assert done.stdout.count("ValueError: too fast") == 2
    results = load_results(tmp_path / "out")
    failed = results.failures
    assert failed[["policy", "rate", "seed"]].to_numpy().tolist() == [["mine", 5000, 0], ["mine", 5000, 1]]
    assert "mine.py:6: ValueError: too fast" in failed["error"][0]
    assert len(results.requests) == (RUNS - 2) * 40
    (tmp_path / "mine.py").write_text(FAILS_AT_50.replace("too fast", "still"))
    repaired = qllm(
        *("simulate", config, "--out", tmp_path / "out", "--force"),
        *("--set", "policies.0={name: fcfs, label: mine}"),
    )
    assert repaired.returncode == 0, repaired.stderr
    assert load_results(tmp_path / "out").failures.empty


def test_warnings_are_told_again_by_a_sweep_that_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    longer = [
        "classes.be.prompt.uniform=[200000, 200001]",
        "limits.max_batched_tokens=300000",
        "limits.kv_blocks=100000",
    ]
    messages = []
    for _ in range(2):
        with pytest.warns(cache.ExtrapolationWarning) as caught:
            simulate(config, set=[*longer, "requests=5", "seeds=1"], keep=tmp_path / "points")
        messages.append({str(warning.message) for warning in caught})
    assert messages[0] == messages[1]


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_backend_that_is_not_installed_is_one_line(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ray", "dask", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"--backend {backend}: not installed; install it with: pip install '{backend}"
    ):
        simulate(write_config(tmp_path), backend=backend)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'dask'\? allowed: local, ray, dask"):
        simulate(write_config(tmp_path), backend="dusk")


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_the_same_bytes_from_a_cluster(backend: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    config = write_config(tmp_path)
    one = qllm("simulate", config, "--out", tmp_path / "one", "--jobs", 1)
    other = qllm("simulate", config, "--out", tmp_path / "other", "--jobs", 2, "--backend", backend)
    assert other.returncode == 0, other.stderr
    assert len(list((tmp_path / "other" / "points").glob("*.parquet"))) == RUNS
    assert (tmp_path / "one" / REQUESTS).read_bytes() == (tmp_path / "other" / REQUESTS).read_bytes()
    assert one.stdout.replace("/one", "") == other.stdout.replace("/other", "")


CLUSTERS = {"local": "joblib", "ray": "ray", "dask": "distributed"}
KILLED_ON = ["local", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ray", "dask"))]


def once_killed(number: int, folder: Path) -> int:
    if number == 3 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def always_killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("backend", KILLED_ON)
def test_what_a_killed_worker_had_in_hand_is_run_again(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(CLUSTERS[backend])
    with parallel(backend, 2) as run_all:
        found = list(run_all(joblib.delayed(once_killed)(number, tmp_path) for number in range(12)))
    assert (tmp_path / "killed").exists()
    assert sorted(found) == list(range(12))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("backend", KILLED_ON)
def test_what_kills_every_worker_is_given_up_in_one_line(backend: str) -> None:
    pytest.importorskip(CLUSTERS[backend])
    found = []

    def run() -> None:
        with parallel(backend, 2) as run_all:
            for number in run_all(joblib.delayed(always_killed)(number) for number in range(12)):
                found.append(number)

    with pytest.raises(SweepError, match=rf"^--backend {backend}: a worker died"):
        run()
    assert set(found) <= set(range(12)) - {3}
    if backend == "local":
        assert len(found) >= 10, "all that can be done is done, but for what ran beside it each time"


def test_a_sweep_survives_a_killed_worker_with_the_same_bytes(tmp_path: Path) -> None:
    kills = FAILS_AT_50.replace(
        'raise ValueError("too fast")',
        "flag = __import__('pathlib').Path(__file__).with_suffix('.killed')\n"
        "            if not flag.exists():\n"
        "                flag.touch()\n"
        "                __import__('os')._exit(1)",
    )
    (tmp_path / "mine.py").write_text(kills)
    config = write_config(tmp_path, CONFIG.replace("- {name: qllm, fill_tokens: 0}", "- {file: mine.py}"))
    swept = ["sweep.rate=[5, 5000]"]
    broken = simulate(config, set=swept, jobs=2)
    assert (tmp_path / "mine.killed").exists()
    pd.testing.assert_frame_equal(broken.requests, simulate(config, set=swept).requests)


def test_a_worker_that_dies_ends_the_sweep_with_one_line(tmp_path: Path) -> None:
    dies = FAILS_AT_50.replace('raise ValueError("too fast")', "__import__('os')._exit(1)")
    (tmp_path / "mine.py").write_text(dies)
    config = write_config(tmp_path, CONFIG.replace("- {name: qllm, fill_tokens: 0}", "- {file: mine.py}"))
    done = qllm("simulate", config, "--out", tmp_path / "out", "--jobs", 2, "--set", "sweep.rate=[5, 5000]")
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if not line.startswith("simulating: ")]  # where it takes long
    assert len(told) == 1
    assert told[0].startswith("error: --backend local: a worker died")
