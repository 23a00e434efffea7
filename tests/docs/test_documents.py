"""Documents keep their word: commands run, links lead somewhere, Python examples give what they say.

Commands are the lines of code blocks that begin with qllm, python or make; the qllm commands of one document run one
after the other in a working copy of configs/, with fewer requests. A YAML block whose first line is `# PATH` is written
there first. What NOT_RUN names is only parsed, as are commands inside sentences.
"""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib as mpl
import pytest
import typer
import yaml
from typer.testing import CliRunner

from qllm.cli import app
from qllm.experiment.metrics import SUMMARY_COLUMNS
from qllm.scheduler import POLICIES

mpl.use("Agg")
ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "traces", "findings", "benchmarks")
DOCS = [*sorted(ROOT.glob("*.md")), *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md")))]
IDS = [path.relative_to(ROOT).as_posix() for path in DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:qllm|python|make) [^`\n]*)`")
FILE = re.compile(
    r"`((?:scheduler|sim|traces|executor|qllm|benchmarks|tools|tests|configs|examples|findings|docs)/[\w./-]+)`"
)
NAME = re.compile(r"`(qllm(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FEWER = ["--set", "sweep.rate=[1]", "--set", "requests=30", "--set", "seeds=1", "--jobs", "1"]
NOT_RUN = {
    "qllm run": "measures on the real engine, or downloads a model",
    "qllm calibrate": "measures on the real engine, or downloads a model",
    "qllm validate": "measures on the real engine, or downloads a model",
    "qllm serve": "serves until it is told to end",
    "qllm timings import": "needs the extra timings",
}  #: beginnings of commands, and why the tests only parse them
WORDS = {"README.md": 900, "docs/fidelity.md": 1000}  #: at most; tables count


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced and the indented code blocks, in order."""
    found = [(match.start(), match[1], match[2]) for match in FENCE.finditer(text)]
    prose = FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)  # positions stay
    for match in re.finditer(r"(?:^ {4}.*\n)+", prose, re.MULTILINE):
        if match[0].strip():
            found.append((match.start(), "", re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)))
    return [(language, content) for _, language, content in sorted(found)]


def commands(content: str) -> list[list[str]]:
    """The words of the lines of a block that are commands."""
    lines = [line.strip() for line in content.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(qllm|python|make|pip|uv)\s", line)]


def is_run(words: list[str]) -> bool:
    """Whether the tests run a command, and do not only parse it."""
    not_run = any(words[: len(start.split())] == start.split() for start in NOT_RUN)
    return words[0] == "qllm" and not not_run and "FILE" not in words


def parse(words: list[str]) -> None:
    """Fail where the command line does not exist as it stands."""
    program, *rest = words
    if program == "qllm":
        result = CliRunner().invoke(app, [*rest, "--help"])  # options are looked at before --help is
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    elif program == "python":
        if rest[0] == "-m":
            module = ROOT / rest[1].replace(".", "/")
            rest = [module.joinpath("__init__.py").relative_to(ROOT).as_posix(), *rest[2:]]
        script = ROOT / rest[0]
        assert script.is_file(), shlex.join(words)
        text = script.read_text(encoding="utf-8")
        if "add_out(" in text:
            text += (ROOT / "benchmarks" / "results_file.py").read_text(encoding="utf-8")
        for option in (word for word in rest[1:] if word.startswith("-")):
            assert f'"{option.split("=")[0]}"' in text, f"{rest[0]} has no option {option}"
    elif program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    else:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(names.split(",")) <= set(extras), shlex.join(words)


def run(words: list[str]) -> None:
    """Run a `qllm` command here, cheaply."""
    arguments = words[1:]
    if arguments[0] == "simulate":
        given = "".join(arguments)
        arguments += FEWER if "sweep.rate" not in given else FEWER[2:]
    if arguments[0] == "capacity":
        arguments += [*FEWER[2:], "--set", "capacity={precision: 0.2, curve: 1}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}\n{result.exception!r}"


@pytest.mark.parametrize("path", DOCS, ids=IDS)
@pytest.mark.filterwarnings("ignore")
def test_commands_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for language, content in blocks(path.read_text(encoding="utf-8")):
        target = re.match(r"# (\S+\.yaml)\n", content)
        if language == "yaml":
            assert yaml.safe_load(content), "an example that is empty"
            if target:
                (tmp_path / target[1]).write_text(content, encoding="utf-8")
            continue
        for words in commands(content) if language in ("", "sh", "bash") else []:
            parse(words)
            if is_run(words):
                run(words)


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_commands_inside_sentences_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for found in INLINE.findall(text):
        if not re.search(r"\.\.\.|[A-Z]{3,}", found):  # a placeholder
            parse(shlex.split(found))


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_files_and_names_in_the_text_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == [], f"{path.name} names files that do not exist"
    for name in NAME.findall(text):
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError) as error:
            pytest.fail(f"{path.name}: {name}: {error}")


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_python_examples_give_what_they_say(path: Path) -> None:
    result = doctest.testfile(str(path), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    for language, content in blocks(path.read_text(encoding="utf-8")):
        if language == "python" and ">>>" not in content:
            compile(content, path.name, "exec")
            for line in content.splitlines():
                if line.startswith(("import ", "from ")):
                    exec(line, {})


def shown_commands() -> list[list[str]]:
    """The words of every command in code blocks and inside sentences."""
    found = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        found += [words for language, content in blocks(text) if language in ("", "sh") for words in commands(content)]
        found += [words.split() for words in INLINE.findall(FENCE.sub("", text))]
    return found


def offered_commands() -> list[list[str]]:
    """What the command line offers: the words of every command and of every command of a group."""
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", {})
        found += [["qllm", name, sub] for sub in inner] or [["qllm", name]]
    return found


def test_documents_show_every_command() -> None:
    shown = shown_commands()
    offered = offered_commands()
    assert ["qllm", "simulate"] in offered
    assert [wanted for wanted in offered if not any(words[: len(wanted)] == wanted for words in shown)] == []


def test_commands_that_are_not_run_are_shown() -> None:
    shown = shown_commands()
    assert [start for start in NOT_RUN if not any(w[: len(start.split())] == start.split() for w in shown)] == []


@pytest.mark.parametrize("name", WORDS)
def test_pages_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= WORDS[name]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page != "README.md" and f"({page})" not in index] == []


def test_every_policy_setting_and_metric_is_documented() -> None:
    policies = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    for name, cls in POLICIES.items():
        row = next(line for line in policies.splitlines() if line.startswith(f"| `{name}` |"))
        settings = list(inspect.signature(cls).parameters)
        assert all(f"`{setting}`" in row for setting in settings) or f"as `{cls.__base__.__name__.lower()}`" in row
    metrics = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [column for column in SUMMARY_COLUMNS if f"`{column}`" not in metrics] == []


def test_the_citation_names_the_paper_and_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2503.09304"


@pytest.mark.slow
def test_the_table_of_models_is_that_of_the_installed_transformers() -> None:
    pytest.importorskip("torch")
    script = ROOT / "tools" / "list_model_families.py"
    told = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    shown = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").replace("`", "")
    for paragraph in told.strip().split("\n\n"):
        assert paragraph in shown


@pytest.mark.slow
def test_the_check_of_fidelity_finds_no_difference() -> None:
    script = ROOT / "benchmarks" / "check_fidelity.py"
    command = [sys.executable, str(script), "--quick"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "identical" in told
    assert "DIFFERENT" not in told


FINDINGS = sorted((ROOT / "findings").glob("*.sh"))


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_keeps_the_form(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    comment = text[: text.index("set -euo pipefail")]
    for told in ("# One would guess:", "# What happens:", "# Versions:", "# Run: 20"):
        assert told in comment, told
    assert re.search(r"^# (Reported|Documented): ", comment, re.MULTILINE)
    installed = re.findall(r"pip\" install --quiet (.*)$", text, re.MULTILINE)  # none, where Python itself surprises
    assert all("==" in package for package in " ".join(installed).split()), "packages are pinned"
    assert "qllm" not in text
    assert f"({path.name})" in (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
