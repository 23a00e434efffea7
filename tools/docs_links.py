"""A hook of MkDocs: links that leave docs/ lead to files of the repository, which the web pages do not hold.

In the repository they work as they stand. In the web pages they become links into `repo_url` where mkdocs.yml names
one, else plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page's text with the links that leave docs/ replaced."""
    folder = (DOCS / page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if target.is_relative_to(DOCS) and not target.is_dir():
            return found[0]
        if not config.repo_url:
            return found[1]
        return f"[{found[1]}]({config.repo_url.rstrip('/')}/blob/main/{target.relative_to(DOCS.parent).as_posix()})"

    return LINK.sub(replaced, markdown)
