"""Folders of results: nobody's files are replaced unasked, and what is written names no home."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.folders import claim
from qllm.experiment.results import CONFIG as WRITTEN
from qllm.experiment.results import load_results
from qllm.experiment.results import write_config as write_resolved
from qllm.experiment.sweep import simulate
from qllm.plots.report import write_report
from qllm.traces.files import portable_path
from tests.cli_support import CONFIG, qllm, write_config

ONE = ["sweep.rate=[5]", "seeds=1"]


def test_the_same_configuration_goes_on_in_its_folder(tmp_path: Path) -> None:
    path, out = write_config(tmp_path), tmp_path / "out"
    config = load_config(path, ONE)
    for _ in range(2):
        simulate(path, set=ONE, keep=out / "points").save(claim(out, config, "simulation"))
    claim(out, load_config(out / WRITTEN), "simulation")  # what was written is the same configuration
    claim(out, load_config(path, [*ONE, "name=other"]), "simulation")  # whatever it is called


def test_another_configuration_needs_force(tmp_path: Path) -> None:
    path, out = write_config(tmp_path), tmp_path / "out"
    simulate(path, set=ONE).save(out)
    for name in ("timeline.png", "report.html", "failures.csv", "notes.txt"):
        (out / name).touch()
    other = load_config(path, [*ONE, "requests=30", "limits.max_seqs=4"])
    with pytest.raises(
        ConfigError, match=r"out/ holds results of another configuration: requests, limits differ; .*--force"
    ):
        claim(out, other, "simulation")
    assert (out / "timeline.png").exists()
    claim(out, other, "simulation", force=True)
    assert {p.name for p in out.iterdir()} == {"requests.parquet", "summary.csv", WRITTEN, "notes.txt"}


@pytest.mark.parametrize(
    ("before", "now"), [("engine", "simulation"), ("simulation", "engine"), ("engine", "validation")]
)
def test_measured_and_simulated_results_do_not_replace_one_another(before: str, now: str, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    timings = "affine: modelled" if before == "simulation" else f"{before}: real"
    folder = claim(tmp_path / "out", config, before)
    write_resolved(config.model_copy(update={"provenance": {"timings": timings}}), folder)
    claim(folder, config, before)
    with pytest.raises(ConfigError, match=rf"holds the results of (an|a) {before}"):
        claim(folder, config, now)


@pytest.mark.parametrize("content", [CONFIG, "provenance: {timings: x}\n", "[", "a: 1", ""])
def test_a_configuration_of_somebodys_own_is_not_replaced(content: str, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WRITTEN).write_text(content)
    with pytest.raises(ConfigError, match=r"out/ holds a config\.yaml that .*; allowed: another --out or name"):
        claim(tmp_path / "out", config, "simulation")
    assert (tmp_path / "out" / WRITTEN).read_text() == content


def test_a_folder_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.csv").write_text("mine")
    command = ["simulate", path, "--out", tmp_path / "mine", "--jobs", 1, *(f"--set={one}" for one in ONE)]
    done = qllm(*command)
    assert done.returncode == 2
    assert "holds files that qllm did not write, such as summary.csv; allowed:" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "mine" / "summary.csv").read_text() == "mine"
    forced = qllm(
        "simulate", path, "--out", tmp_path / "mine", "--force", "--jobs", 1, *(f"--set={one}" for one in ONE)
    )
    assert forced.returncode == 0, forced.stderr


def test_an_interrupted_sweep_may_be_changed(tmp_path: Path) -> None:
    (tmp_path / "out" / "points").mkdir(parents=True)
    claim(tmp_path / "out", load_config(write_config(tmp_path)), "simulation")


def test_a_name_stays_inside_the_folder_of_results(tmp_path: Path) -> None:
    done = qllm("simulate", write_config(tmp_path), "--set", "name=../../evil", cwd=tmp_path)
    assert done.returncode == 2
    assert "name: '../../evil' is not a plain file name" in done.stderr


def test_what_is_written_names_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ann"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    path = write_config(home / "work")
    assert portable_path(str(home / "work" / "a.csv"), home) == "work/a.csv"
    assert portable_path(str(home / "work" / "a.csv"), "/elsewhere") == "~/work/a.csv"
    for out, named in ((home / "out", "../work/timings.csv"), (tmp_path / "out", "~/work/timings.csv")):
        results = simulate(path, set=ONE)
        text = (results.save(out) / WRITTEN).read_text()
        assert "ann" not in text
        assert yaml.safe_load(text)["timings"] == named
        assert simulate(out / WRITTEN).requests.equals(results.requests)


def test_a_failure_names_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from qllm.scheduler import Policy\n\nclass Mine(Policy):\n    def level(self, r):\n        return 1 / 0\n"
    )
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    with pytest.warns(UserWarning, match="1 of 2 simulations failed"):
        simulate(path, set=ONE).save(tmp_path / "out")
    failed = load_results(tmp_path / "out").failures
    assert failed["error"].tolist() == ["~/mine.py:5: ZeroDivisionError: division by zero"]


def test_settings_that_are_null_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from qllm.scheduler import Policy\n\nclass Mine(Policy):\n    def __init__(self, most=5):\n"
        "        self.most = most\n\n    def level(self, r):\n        assert self.most is None\n        return 0\n"
    )
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py, most: null}"))
    results = simulate(path, set=ONE)
    assert simulate(results.save(tmp_path / "out") / WRITTEN).requests.equals(results.requests)


def test_a_report_names_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ann"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = write_config(home)
    (home / "other.csv").write_text((home / "timings.csv").read_text())
    for name, timings in (("a", "timings.csv"), ("b", "other.csv")):
        simulate(path, set=[*ONE, f"timings={timings}"]).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    html = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html").read_text()
    assert "ann/timings.csv" in html or "~/timings.csv" in html
    assert str(tmp_path) not in html


def test_a_calibration_replaces_no_file_unasked(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "mine.csv").write_text("mine")
    done = qllm("calibrate", "--model", "nowhere", "--out", tmp_path / "mine.csv")
    assert done.returncode == 2
    assert "mine.csv: is there already; allowed: another --out, or --force" in done.stderr
    assert (tmp_path / "mine.csv").read_text() == "mine"
