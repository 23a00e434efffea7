"""A sweep over timing traces: each row of its tables says whether its step times are measured, imported or modelled."""

from dataclasses import replace
from pathlib import Path

import pytest

from qllm import simulate
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import write_config


def test_every_row_says_its_own_source(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for source in ("measured", "imported"):
        timings = affine_timings(layers=4, experts=8, top_k=2, hidden=64)
        replace(timings, source=source).save(tmp_path / f"{source}.csv")
    files = [str(tmp_path / f"{name}.csv") for name in ("timings", "measured", "imported")]
    results = simulate(
        config, set=[f"sweep.timings=[{','.join(files)}]", "sweep.rate=[5]", "seeds=1", "policies=[fcfs]"]
    )
    for table in (results.requests, results.summary):
        told = {Path(file).stem: source for file, source in zip(table["timings"], table["timings_source"], strict=True)}
        assert told == {"timings": "modelled", "measured": "measured", "imported": "imported"}
    assert len(results.summary) == 6


@pytest.mark.parametrize("table", ["requests", "summary"])
def test_without_such_a_sweep_there_is_no_such_column(tmp_path: Path, table: str) -> None:
    results = simulate(write_config(tmp_path), set=["sweep.rate=[5]", "seeds=1"])
    assert "timings_source" not in getattr(results, table)
