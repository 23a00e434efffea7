"""The face of each package: every name can be imported, is explained, and none that users need is missing."""

from __future__ import annotations

import ast
import inspect
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from qllm.errors import EXPECTED
from tests.cli_support import qllm

ROOT = Path(__file__).parents[1]
FACES = {"qllm": "qllm", "qllm.scheduler": "scheduler", "qllm.sim": "sim", "qllm.traces": "traces"}
FACES |= {"qllm.executor": "executor"}


def typed_names(folder: str) -> set[str]:
    """The names that a face imports: under TYPE_CHECKING where it is lazy."""
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    lazy = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    body = lazy[0].body if lazy else tree.body
    return {name.asname or name.name for node in body if isinstance(node, ast.ImportFrom) for name in node.names}


@pytest.mark.parametrize("package", FACES)
def test_every_public_name_can_be_imported_and_is_explained(package: str) -> None:
    if package == "qllm.executor":
        pytest.importorskip("torch")
    module = import_module(package)
    assert typed_names(FACES[package]) == {*module.__all__}
    assert {*module.__all__} <= {*dir(module)}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} says nothing"


def test_every_error_that_a_user_may_catch_has_a_face() -> None:
    shown = {name for package in FACES for name in import_module(package).__all__}
    assert {error.__name__ for error in EXPECTED} <= shown


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_need_no_other_names(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qllm":
            assert node.module in {*FACES, "qllm.executor.testing"}, f"{path.name} imports from {node.module}"


def test_the_version_is_the_same_everywhere() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == declared
    assert import_module("qllm").__version__ == version("qllm-moe")
    assert qllm("--version").stdout == f"qllm {version('qllm-moe')}\n"
