"""What the tests of the command line share: a small configuration whose simulation takes milliseconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qllm.traces.step_times.testing import affine_timings

CONFIG = """\
name: small
timings: timings.csv
classes:
  ls:
    priority: 0
    share: 0.25
    prompt: {uniform: [10, 50]}
    output: {fixed: 5}
    slo: {ttft: 0.05}
  be:
    priority: 1
    prompt: {uniform: [200, 800]}
    output: {fixed: 10}
arrival: {process: poisson}
requests: 40
seeds: 2
limits: {max_seqs: 8, max_batched_tokens: 2048}
policies:
  - fcfs
  - {name: qllm, fill_tokens: 0}
sweep:
  rate: [5, 50]
"""


def write_config(folder: Path, text: str = CONFIG) -> Path:
    """`text` as a configuration in `folder`, with the timing trace that it names."""
    timings = affine_timings(layers=4, experts=8, top_k=2, hidden=64)
    timings.save(folder / "timings.csv")
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def qllm(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-c", "from qllm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)
