import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_for_the_gpus_we_mean_and_fits_their_shared_memory():
    # In another process: Triton interprets kernels in this one where there is no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiling"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for kernel in ("write_rows", "attend_parts", "merge_parts", "attend_tile"):
        assert kernel in run.stdout
