"""The report: what stands in it, and that a browser opens it without a network and without an error."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from qllm.config.yaml_lines import ConfigError
from qllm.experiment.results import Results, load_results
from qllm.experiment.sweep import simulate
from qllm.plots.curves import save_figures
from qllm.plots.report import between, compare, differences, write_report
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import qllm, write_config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--enable-logging=stderr", "--v=0", "--dump-dom"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two results: the small sweep, and one with fewer sequences, another rate and a failure."""
    parent = tmp_path_factory.mktemp("report")
    config = write_config(parent)
    one = simulate(config).save(parent / "one")
    changed = ["limits.max_seqs=2", "sweep.rate=[50, 80]", "policies=[{name: fcfs, label: <b>fcfs</b>}, qllm]"]
    other = simulate(config, set=changed)
    failures = pd.DataFrame([{"policy": "qllm", "rate": 90.0, "seed": 0, "error": "mine.py:3: no <idea>"}])
    Results.of(other.requests, other.config, failures).save(parent / "two")
    return [one, parent / "two"]


@pytest.fixture(scope="module")
def both(folders: list[Path]) -> Path:
    return write_report(folders, folders[0].parent / "both.html")


def test_the_file_holds_everything_itself(both: Path) -> None:
    text = both.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 1 + 2 * 3  # the icon, and three figures of each
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_numbers_come_with_their_provenance(both: Path) -> None:
    text = both.read_text()
    assert text.count('<span class="source modelled">modelled</span> Simulated on modelled step times') == 4
    assert "Timings: affine: modelled" in text


def test_text_of_users_is_escaped_and_failures_are_shown(both: Path) -> None:
    text = both.read_text()
    assert "<b>fcfs</b>" not in text
    assert "&lt;b&gt;fcfs&lt;/b&gt;" in text
    assert "Failed: 1 simulations are not in the tables" in text
    assert "no &lt;idea&gt;" in text


def test_what_differs_between_configurations(folders: list[Path]) -> None:
    found = dict(differences([load_results(folder) for folder in folders]))
    assert found == {
        "limits.max_seqs": ["8", "2"],
        "policies.0.label": ["-", "<b>fcfs</b>"],
        "policies.1.fill_tokens": ["0", "-"],
        "sweep.rate": ["[5, 50]", "[50, 80]"],
    }


def test_only_the_same_points_stand_side_by_side(folders: list[Path]) -> None:
    loaded = [load_results(folder) for folder in folders]
    rows = compare(loaded, ["a", "b"])
    assert rows[["policy", "rate", "class"]].to_numpy().tolist() == [["qllm", 50.0, "ls"], ["qllm", 50.0, "be"]]
    for label, results in zip("ab", loaded, strict=True):
        s = results.summary
        row = s[(s["policy"] == "qllm") & (s["rate"] == 50) & (s["class"] == "ls")].iloc[0]
        assert rows[f"ttft_p99_s: {label}"][0] == row["ttft_p99_s"]


def test_a_policy_has_one_colour_in_all_results(folders: list[Path], tmp_path: Path, monkeypatch) -> None:
    asked: list[list[str]] = []

    def keep(results: Results, out: str, caption: str, policies: list[str]) -> list[Path]:
        asked.append(list(policies))
        return save_figures(results, out, caption, policies)

    monkeypatch.setattr("qllm.plots.report.save_figures", keep)
    write_report(folders, tmp_path / "report.html")
    assert asked == [["fcfs", "qllm", "<b>fcfs</b>"]] * 2


def test_saturation_and_each_source_of_a_sweep_over_timings_are_told(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    affine_timings(layers=4, experts=8, top_k=2, hidden=64, source="imported").save(tmp_path / "other.csv")
    swept = simulate(config, set=["sweep.timings=[timings.csv, other.csv]", "sweep.rate=[5]", "seeds=1"])
    text = write_report([swept.save(tmp_path / "out")], tmp_path / "report.html").read_text()
    assert '<span class="source modelled">modelled</span> Simulated on modelled step times' in text
    assert '<span class="source imported">imported</span> Simulated on kernel times that others' in text
    assert '<td class="text" data-value="no">no</td>' in text


def test_the_timeline_is_in_and_the_same_results_give_the_same_bytes(folders: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders[0], folders[0].parent / "copy"))
    assert "<h3>Timeline</h3>" not in write_report([copy], tmp_path / "first.html").read_text()
    (copy / "timeline.png").write_bytes(b"\x89PNG")
    first, again = (write_report([copy], tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert b'alt="timeline" src="data:image/png;base64,iVBORw=="' in first
    assert first == again


def test_the_command_writes_into_the_first_folder(folders: list[Path]) -> None:
    done = qllm("report", "one", "two", cwd=folders[0].parent)
    assert (done.returncode, done.stdout.strip()) == (0, "one/report.html")
    assert (folders[0] / "report.html").read_text().startswith("<!doctype html>")
    nothing = qllm("report", "nowhere", cwd=folders[0].parent)
    assert nothing.returncode == 2
    assert "expected a folder written by qllm simulate" in nothing.stderr
    with pytest.raises(ConfigError, match="given twice"):
        write_report([folders[0], folders[0]], "unused.html")


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page as it stands after its scripts ran, and the console's messages."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_opens_it_without_a_console_error_and_sorts(both: Path, tmp_path: Path) -> None:
    dom, console = browse(both, tmp_path / "profile")
    assert console == []
    assert dom.count('tabindex="0"') > 20  # the script ran to its end
    act = """<script>
    const tables = [...document.querySelectorAll("table.sortable")], headsOf = table => [...table.tHead.rows[0].cells];
    const table = tables.find(one => headsOf(one).some(head => head.textContent === "slo_attainment"));
    const heads = headsOf(table);
    const column = heads.findIndex(head => head.textContent === "slo_attainment");
    heads[column].click(); heads[column].click();
    const filter = table.parentElement.previousElementSibling;
    const values = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[column].dataset.value);
    const all = values();
    filter.value = "LS qllm"; filter.dispatchEvent(new Event("input"));
    document.title = JSON.stringify([all, values()]);
    console.error("on purpose");
    </script></body>"""
    page = tmp_path / "acted.html"
    page.write_text(both.read_text().replace("</body>", act))
    dom, console = browse(page, tmp_path / "profile")
    assert len(console) == 1  # so an error would have been seen above
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    shown, filtered = (re.findall(r'"([^"]*)"', part) for part in title[1].replace("&quot;", '"').split("],["))
    known = [float(value) for value in shown if value]
    assert known == sorted(known, reverse=True)
    assert len(known) == 4  # two rates, two policies
    assert shown[4:] == [""] * 4  # be has no SLO: always last
    assert len(filtered) == 2


def test_policies_and_results_are_compared_seed_by_seed(folders: list[Path], both: Path) -> None:
    text = both.read_text()
    assert text.count("Policies compared seed by seed") == 2
    assert "qllm minus fcfs" in text
    assert "difference [95 % interval]" in text
    loaded = [load_results(folder) for folder in folders]
    rows = between(loaded, ["a", "b"])
    assert rows["note"] == ""
    assert {row[0].shown for row in rows["rows"]} == {"qllm"}
    assert {row[4].shown for row in rows["rows"]} == {"b minus a"}


def test_what_cannot_be_paired_is_said(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    few = ["sweep.rate=[50]", "requests=20", "policies=[fcfs]"]
    for name, changed in (("one", "seeds=1"), ("two", "seeds=2"), ("other", "classes.ls.share=0.5")):
        simulate(config, set=[*few, changed]).save(tmp_path / name)
    one, two, other = (load_results(tmp_path / name) for name in ("one", "two", "other"))
    assert between([two, other], ["a", "b"])["note"].startswith("The workloads differ")
    assert between([one, two], ["a", "b"])["note"].startswith("One seed says nothing about chance")
    assert between([two, simulate(config, set=[*few, "limits.max_seqs=2"])], ["a", "b"])["note"] == ""
