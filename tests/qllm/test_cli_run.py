"""qllm run: the real engine behind the command line, with the files of qllm simulate."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from qllm.config.config import load_config
from qllm.executor.calibration.environment import device_name
from qllm.executor.errors import LoadError
from qllm.experiment import progress as progress_of
from qllm.experiment.engine_run import engine_clock, load_target, run
from qllm.experiment.results import load_results
from qllm.experiment.run import runs
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import qllm, write_config

SMALL = ["--set", "sweep.rate=[20]", "--set", "seeds=1", "--set", "requests=8", "--set", "limits.kv_blocks=600"]


def test_run_writes_what_simulate_writes_and_says_that_it_was_measured(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    done = qllm("run", config, "--out", tmp_path / "real", "--timeline", *SMALL)
    assert done.returncode == 0, done.stderr
    assert qllm("simulate", config, "--out", tmp_path / "sim", "--timeline", *SMALL).returncode == 0
    names = [{p.name for p in (tmp_path / kind).iterdir()} - {"points"} for kind in ("real", "sim")]
    assert names[0] == names[1]
    assert "Measured on" in done.stdout
    assert "affine" not in done.stdout  # the configuration's timing trace had no part in it
    real, simulated = (load_results(tmp_path / kind) for kind in ("real", "sim"))
    assert list(real.requests.columns) == list(simulated.requests.columns)
    assert real.requests.dtypes.equals(simulated.requests.dtypes)
    for same in ("arrival_s", "prompt_tokens", "output_tokens", "class"):
        assert real.requests[same].equals(simulated.requests[same]), same
    r = real.requests
    assert (r["status"] == "finished").all()
    assert (r["first_launch_s"] >= r["arrival_s"]).all()
    waited = r["queueing_s"] + r["running_s"] + r["suspended_s"]
    np.testing.assert_allclose(waited, r["finish_s"] - r["arrival_s"], rtol=0, atol=1e-6)
    assert (r["isolated_ttft_s"] > 0).all()
    assert real.config.provenance["timings"].startswith("engine: real;")


def test_every_phase_is_told_when_it_begins_and_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_of, "EVERY_S", 0.1)
    slow = {"sweep.rate": "[6]", "seeds": "1", "requests": "8", "limits.kv_blocks": "600"}
    config = load_config(write_config(tmp_path), [f"{key}={value}" for key, value in slow.items()])
    with progress_of.progress("loading the model") as update:
        run(config, load_target(None), update)
    lines = capsys.readouterr().err.splitlines()
    first, second = (f"run {n} of 2, {this}: requests" for n, this in enumerate(runs(config), start=1))
    isolated = f"isolated TTFT, for {first.removesuffix('requests')}lone requests"
    begun = [line for line in lines if " done after " not in line]
    assert begun == [isolated, first, second]
    for phase, total in ((isolated, 18), (first, 8), (second, 8)):
        assert any(re.fullmatch(rf"{re.escape(phase)}: [1-9]\d* of {total} done after \d+ s", line) for line in lines)


@pytest.mark.parametrize(
    ("model", "device", "dtype", "expected"),
    [
        (None, "warp", "auto", "--device warp"),
        (None, "cpu", "int3", "--dtype int3: unknown; allowed: auto"),
        ("nowhere/at-all", "cpu", "auto", "--model nowhere/at-all: cannot be loaded"),
    ],
)
def test_models_and_devices_that_do_not_exist(model, device, dtype, expected) -> None:
    with pytest.raises(LoadError, match=expected):
        load_target(model, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("too_much", "reason"),
    [
        (["classes.be.prompt={fixed: 20000}"], "allowed: 16384 together"),
        (["classes.be.prompt={fixed: 500}", "limits.kv_blocks=20"], "its class may use 20"),
        (["classes={be: {prompt: {fixed: 500}, output: {fixed: 4}}}", "limits.kv_blocks=1"], "its class may use 1"),
    ],
)
def test_what_can_never_be_served_is_rejected_as_in_a_simulation(tmp_path: Path, too_much, reason) -> None:
    settings = [part for setting in too_much for part in ("--set", setting)]
    done = qllm("run", write_config(tmp_path), "--out", tmp_path / "out", *SMALL, *settings)
    assert done.returncode == 0, done.stderr
    requests = load_results(tmp_path / "out").requests
    be = requests[requests["class"] == "be"]
    assert len(be)
    assert (be["status"] == "rejected").all()
    assert be["reason"].str.contains(reason).all()
    assert (requests["status"][requests["class"] != "be"] == "finished").all()


def test_timings_measured_here_cut_the_passes_and_others_do_not(tmp_path: Path) -> None:
    target = load_target(None, dtype="float32")
    here = {"layers": 8, "hidden": 256, "experts": 16, "top_k": 4, "dtype": "float32"}
    for changed, used in (({}, True), ({"source": "modelled"}, False), ({"experts": 8}, False)):
        timings = affine_timings(
            **{**here, "source": "measured", "device": device_name(target.model.device), **changed}
        )
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        timings.save(path)
        config = load_config(write_config(tmp_path), [f"timings={path}"])
        assert (engine_clock(target, config).steps is not None) is used
