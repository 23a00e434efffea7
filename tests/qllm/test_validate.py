"""Validation: the same requests in both worlds, errors, and where they come from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from qllm.cli import app
from qllm.config.config import load_config
from qllm.executor.calibration.environment import device_name
from qllm.executor.model.info import model_facts
from qllm.executor.model.loading import LoadedModel, prepare_model
from qllm.executor.testing import tiny_config, tiny_model
from qllm.experiment.run import runs
from qllm.scheduler import Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.testing import affine_timings
from qllm.traces.step_times.timings import Timings
from qllm.validation.attribution import after_rest, by_pass
from qllm.validation.results import report, save
from qllm.validation.validate import REAL, SIMULATED, Comparison, compare, errors

CONFIG = """\
name: tiny
timings: timings.csv
classes:
  ls: {priority: 0, share: 0.5, prompt: {fixed: 6}, output: {fixed: 3}}
  be: {priority: 1, prompt: {uniform: [10, 40]}, output: {fixed: 4}}
rate: 200
requests: 12
limits: {max_seqs: 4, max_batched_tokens: 32, kv_blocks: 60}
policies: [fcfs, qllm]
"""


@pytest.fixture(scope="module")
def folder(one_thread, tmp_path_factory) -> Path:
    """A configuration with the timing trace that it names, made for the tiny model on this device."""
    folder = tmp_path_factory.mktemp("validate")
    tiny_config("qwen3_moe", num_hidden_layers=2).save_pretrained(folder / "model")
    sizes = {"layers": 2, "hidden": 64, "experts": 8, "top_k": 2, "kv_bytes_per_token": 512}
    device = device_name(torch.device("cpu"))
    affine_timings(**sizes, device=device, dtype="float32", model="tiny").save(folder / "timings.csv")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel.of("tiny", prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2)))


@pytest.fixture(scope="module")
def compared(folder, loaded) -> list[Comparison]:
    return [compare(run, loaded) for run in runs(load_config(folder / "config.yaml"))]


def test_both_worlds_serve_the_same_requests(compared):
    for one in compared:
        frame = one.requests()
        real, simulated = (frame[frame["world"] == world].reset_index(drop=True) for world in (REAL, SIMULATED))
        for column in ("id", "class", "prompt_tokens", "output_tokens", "arrival_s"):
            assert (real[column] == simulated[column]).all()
        assert real["finish_s"].notna().all()
        assert (real["ttft_s"] > 0).all()


@pytest.mark.parametrize("noted", [0.0, 1e-5])
def test_passes_after_a_pause_are_told_from_those_that_follow_one(noted):
    """Also where a request's end is noted a moment after its pass's, as on the real clock."""
    ones = np.ones(4, dtype=int)
    trace = RequestTrace(np.array([0.0, 1.0, 1.0, 2.0]), 8 * ones, ones, 0 * ones, ("all",))
    limits, steps = Limits(max_seqs=1), PassCostModel(affine_timings(host_s=1e-4))
    result = simulate(
        trace, priorities={"all": 0}, policy=make_policy("fcfs"), limits=limits, steps=steps, timeline=True
    )
    ids = [s.pass_id for s in result.slices or []]
    moved = [s._replace(start=s.start + noted, end=s.end + noted / 2) for s in result.slices or []]
    assert after_rest(replace(result, slices=moved, finish=result.finish + 2 * noted / 3)) == {ids[1], ids[3]}


def test_every_real_pass_is_known_as_the_cost_model_saw_it(compared):
    for one in compared:
        real = one.real
        assert len(real.calls) == real.result.passes == len(real.result.routing)
        for call, counts in zip(real.calls, real.result.routing, strict=True):
            assert (np.sum(counts, axis=1) == 2 * (call.prompt_tokens + call.n_decode)).all()


def test_passes_add_up_to_the_time_the_engine_ran(compared):
    table = by_pass(compared).set_index("kind")
    ran = sum(s.end - s.start for one in compared for s in one.real.result.slices)
    passes = table.filter(like="passes", axis=0).drop("between passes")
    assert passes["measured_s"].sum() == pytest.approx(ran)
    assert passes["count"].sum() == sum(len(one.real.calls) for one in compared)
    assert (table["error_s"] == table["predicted_s"] - table["measured_s"]).all()
    assert list(table["error_s"].abs()) == sorted(table["error_s"].abs(), reverse=True)


def requests(world: str, ttft: list[float], finish: list[float]) -> pd.DataFrame:
    rows = {"policy": "fcfs", "rate": 1.0, "seed": 0, "world": world, "class": ["ls", "be"], "arrival_s": [0.0, 1.0]}
    rows |= {"ttft_s": ttft, "tpot_s": [0.1, 0.1], "finish_s": finish, "preemptions": [0, 1]}
    return pd.DataFrame(rows).assign(turnaround_s=lambda frame: frame["finish_s"] - frame["arrival_s"])


def test_errors_are_of_the_simulation_against_the_engine():
    worlds = [requests(REAL, [1.0, 2.0], [2.0, 5.0]), requests(SIMULATED, [1.1, 2.6], [2.0, 4.0])]
    found = errors(pd.concat(worlds)).set_index(["class", "metric", "statistic"])["error"]
    assert found["ls", "ttft_s", "mean"] == pytest.approx(0.1)
    assert found["be", "ttft_s", "p99"] == pytest.approx(0.3)
    assert found["all", "ttft_s", "mean"] == pytest.approx(3.7 / 3 - 1)
    assert found["all", "tpot_s", "p50"] == 0
    assert found["all", "throughput_rps", "mean"] == pytest.approx(5 / 4 - 1)
    assert found["all", "preemptions", "sum"] == 0


def test_any_classes_have_rows_in_their_order_and_their_total_no_name_of_theirs(tmp_path):
    of = {"urgent": "ls", "all": "be", "batch": "ls"}  # the last the same numbers as the first
    worlds = [requests(REAL, [1.0, 2.0], [2.0, 5.0]), requests(SIMULATED, [1.1, 2.6], [2.0, 4.0])]
    both = pd.concat(worlds)
    found = errors(pd.concat([both[both["class"] == old].assign(**{"class": new}) for new, old in of.items()]))
    assert found["class"].unique().tolist() == [*of, "(all)"]
    error = found.set_index(["class", "metric", "statistic"])["error"]
    assert error["all", "ttft_s", "mean"] == pytest.approx(0.3)
    assert error["(all)", "ttft_s", "mean"] == pytest.approx((1.1 + 2.6 + 1.1) / 4 - 1)
    found.to_csv(tmp_path / "errors.csv", index=False)
    pd.DataFrame({"kind": ["decode passes"], "share": [0.0]}).to_csv(tmp_path / "passes.csv", index=False)
    told = report(tmp_path)
    places = [told.index(f" {name} ") for name in (*of, "(all)")]
    assert places == sorted(places)


def test_files_and_report(compared, tmp_path):
    save(compared, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"requests.csv", "errors.csv", "passes.csv", "validation.png"}
    told = report(tmp_path)
    for word in ("fcfs", "qllm", "ttft p99", "throughput_rps", "decode passes"):
        assert word in told


def test_the_command(folder, tmp_path):
    arguments = ["validate", str(folder / "config.yaml"), "--model", str(folder / "model"), "--threads", "1"]
    arguments += ["--timings", str(folder / "timings.csv"), "--out", str(tmp_path), "--set", "policies=[fcfs]"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "largest contributions" in done.output
    assert (tmp_path / "validation.png").exists()


def test_the_command_refuses_the_timings_of_another_model(folder, tmp_path, loaded):
    assert model_facts(loaded.model)["experts"] == 8
    timings = Timings.load(folder / "timings.csv")
    affine_timings(layers=2, hidden=64, experts=16, dtype="float32", device=timings.device).save(tmp_path / "other.csv")
    arguments = ["validate", str(folder / "config.yaml"), "--model", str(folder / "model"), "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--timings", str(tmp_path / "other.csv"), "--out", str(tmp_path / "o")])
    assert "another model or device: experts is 16, used with 8" in str(done.exception)
