"""The API pages list what the packages export, and links of the web pages stay inside them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from docs_links import on_page_markdown  # noqa: E402

FACES = {"qllm": "qllm", **{name: f"qllm.{name}" for name in ("scheduler", "sim", "traces", "executor")}}
OBJECT = re.compile(r"^::: (qllm(?:\.\w+){2,})$", re.MULTILINE)


def text_of(page: str) -> str:
    """A page of docs/api."""
    return (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", FACES)
def test_an_api_page_lists_what_its_package_exports(page: str) -> None:
    members = re.findall(r"^ +- (\w+)$", text_of(page), re.MULTILINE)
    alone = [name.rpartition(".")[2] for name in OBJECT.findall(text_of(page))]
    exported = importlib.import_module(FACES[page]).__all__
    assert sorted(members + alone) == sorted(name for name in exported if not name.startswith("_"))


def test_the_navigation_names_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [page for entry in config["nav"] for value in entry.values() for page in _pages(value)]
    docs = ROOT / "docs"
    assert sorted(named) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def _pages(value: str | list) -> list[str]:
    return [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]


def test_links_that_leave_the_documents_lead_to_the_repository() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="policies.md"))
    text = "[a](scheduler.md#states) [b](../configs/paper.yaml) ![c](img/ttft.png) [d](https://example.org)"
    plain = on_page_markdown(text, page, SimpleNamespace(repo_url=None))
    assert plain == "[a](scheduler.md#states) b ![c](img/ttft.png) [d](https://example.org)"
    linked = on_page_markdown(text, page, SimpleNamespace(repo_url="https://example.org/repo/"))
    assert "[b](https://example.org/repo/blob/main/configs/paper.yaml)" in linked
