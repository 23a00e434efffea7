"""Write docs/configuration.md, the page of all configuration keys."""

from __future__ import annotations

from pathlib import Path

from qllm.config.keys import markdown

if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "configuration.md").write_text(markdown(), encoding="utf-8")
