"""Notebooks run from top to bottom, in a minute or two each on two idle cores, and are stored with their outputs."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 300  #: of one cell; machines that run tests may be busy


def read(path: Path):
    return nbformat.read(path, as_version=4)


def source(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(path)
    if "import torch" in source(notebook) and find_spec("torch") is None:
        pytest.skip("needs the extra executor")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's start-up files
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        iopub_timeout=60,  # a busy kernel sends a picture seconds after its cell has ended
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "notebooks")}},
    )
    run.execute()
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_a_whole_run(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run all cells in order and save"
    outputs = [out for cell in code for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    text = "".join(str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", "")) for out in outputs)
    for folder in (str(ROOT), str(Path.home())):
        assert folder == "/" or f"{folder}/" not in text, "an absolute path of the machine that ran it"
    assert path.stat().st_size < 1_000_000
