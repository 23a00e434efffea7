"""Validation: the same requests in both worlds, errors, and where they come from."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from qllm.cli import app
from qllm.config.config import load_config
from qllm.executor.calibration.grid import Cell
from qllm.executor.calibration.profiler import Visit
from qllm.executor.model.info import device_name, model_facts
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import tiny_config, tiny_model
from qllm.experiment.run import runs
from qllm.scheduler import Limits, make_policy
from qllm.sim import simulate
from qllm.traces.requests.trace import RequestTrace
from qllm.traces.step_times.cost_model import PassCostModel
from qllm.traces.step_times.timings import Timings, affine_timings
from qllm.validation.attribution import by_pass, by_step
from qllm.validation.machine_speed import Visited, at_speed, mean_speed, pace_of, seconds_by, slowed_in
from qllm.validation.results import report, save
from qllm.validation.validate import (
    AT_SPEED,
    REAL,
    SIMULATED,
    Comparison,
    after_rest,
    compare,
    errors,
    replay_run,
    simulate_run,
)

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
def model():
    return prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2))


@pytest.fixture(scope="module")
def compared(folder, model) -> list[Comparison]:
    return [compare(run, model) for run in runs(load_config(folder / "config.yaml"))]


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


def test_every_real_pass_is_known_as_the_step_model_saw_it(compared):
    for one in compared:
        assert len(one.calls) == one.real.passes == len(one.real.routing)
        for call, counts in zip(one.calls, one.real.routing, strict=True):
            tokens = sum(new for new, _ in call.chunks) + call.n_decode
            assert (np.sum(counts, axis=1) == 2 * tokens).all()


def test_a_run_can_be_simulated_with_other_times_than_those_that_cut_it(folder, model):
    run = runs(load_config(folder / "config.yaml"))[0]
    replayed = replay_run(run, model)
    timings = Timings.load(folder / "timings.csv")
    same, slower = simulate_run(replayed, timings), simulate_run(replayed, timings.scaled(3.0))
    assert [p.measured for p in same.passes] == [p.measured for p in slower.passes]
    for before, after in zip(same.passes, slower.passes, strict=True):
        assert after.predicted == pytest.approx(3 * before.predicted, rel=1e-3)
    assert slower.speed.few == pytest.approx(same.speed.few / 3, rel=0.05)
    assert slower.simulated.makespan > same.simulated.makespan


def test_visits_of_a_calibration_are_spread_over_the_run_and_no_more_than_planned(folder, model):
    """What follows the last visit needs an engine of its own, and is left to the caller."""
    run = runs(load_config(folder / "config.yaml"))[0]
    steps: list[int] = []

    def visits(planned: int) -> Iterator[Visit]:
        for done in range(1, planned + 1):
            steps.append(done)
            yield Visit(done, planned, Cell(1, 1, 0), 1e-3)
        steps.append(-1)

    few, many = visits(3), visits(10**9)
    replayed = replay_run(run, model, few)
    assert steps == [1, 2, 3]
    assert [(visit.cell, visit.seconds) for visit in replayed.visits] == [(Cell(1, 1, 0), 1e-3)] * 2  # in the run
    assert next(few, None) is None
    steps.clear()
    replay_run(run, model, many)
    assert 1 < len(steps) < 10**9
    assert next(many).done == steps[-1]


def test_a_simulation_follows_the_speed_that_visits_saw(folder, model):
    """Small steps take twice their time in the second half, by the visits; passes begin in both halves."""
    timings = Timings.load(folder / "timings.csv")
    cells = [Cell(1, 1, 0), Cell(2, 1, 0), Cell(1, 64, 0)]
    seconds = {cell: 1e-3 * cell.tokens for cell in cells}
    visits = [
        Visited(at, cell, seconds[cell] * (2 if at >= 30 and cell.tokens <= 4 else 1))
        for at in np.arange(0, 60, 0.25).tolist()
        for cell in cells
    ]
    (slowed,) = slowed_in([visits], 4)
    pace = pace_of(slowed, PassCostModel(timings), 4)
    most = int(timings.range("dense_pre")[1])
    decoding, prefill = (lambda s: s.cost((), 1, 20, 1).pre), (lambda s: s.cost([(None, most, 0)], 0, 0, 1).pre)
    for now, expected in ((-5, 2 / 3), (10, 2 / 3), (50, 4 / 3), (1000, 4 / 3)):
        assert decoding(pace(now)) / decoding(PassCostModel(timings)) == pytest.approx(expected, rel=0.01)
        assert prefill(pace(now)) == pytest.approx(prefill(PassCostModel(timings)), rel=1e-4)
    replayed = replay_run(runs(load_config(folder / "config.yaml"))[0], model)
    followed = simulate_run(replayed, timings, slowed)
    assert followed.at_speed.makespan < followed.simulated.makespan  # all of the run lies in the fast half


def test_a_run_has_the_speed_that_it_had_against_all_runs(folder, model):
    """Large passes took a third of the time in the second of two runs, and one kind was only visited there."""
    cells, at = [Cell(1, 1, 0), Cell(1, 64, 0)], np.arange(0, 20, 0.5).tolist()
    first = [Visited(now, cell, 1e-3 * cell.tokens) for now in at for cell in cells]
    second = [Visited(now, cell, 1e-3 * (cell.tokens if cell.tokens == 1 else 64 / 3)) for now in at for cell in cells]
    slowed = slowed_in([first, [*second, Visited(20.0, Cell(1, 32, 0), 5e-3)]], 4)
    assert [len(seen) for seen in slowed] == [len(first), len(second) + 1]
    slow, fast = (mean_speed(seen, 4) for seen in slowed)
    assert (slow.few, fast.few) == pytest.approx((1, 1))
    assert slow.many == pytest.approx(3 * fast.many, rel=0.02)
    assert mean_speed([], 4) == (1, 1, 4)
    replayed = replay_run(runs(load_config(folder / "config.yaml"))[0], model)
    timings = Timings.load(folder / "timings.csv")
    runs_ = [simulate_run(replayed, timings, seen) for seen in slowed]
    prefills = [sum(p.predicted for p in one.passes if p.call.chunks) for one in runs_]
    assert prefills[0] > 1.05 * prefills[1]
    assert runs_[0].simulated.makespan > runs_[1].simulated.makespan
    assert [one.at_speed.makespan for one in runs_] == pytest.approx(
        [one.simulated.makespan for one in runs_], rel=0.05
    )  # the speed did not change in a run


def test_passes_add_up_to_the_time_the_engine_ran(compared):
    table = by_pass(compared).set_index("kind")
    ran = sum(s.end - s.start for one in compared for s in one.real.slices)
    assert table["measured_s"].filter(like="passes").drop("between passes").sum() == pytest.approx(ran)
    assert table["count"].filter(like="passes").drop("between passes").sum() == sum(len(one.calls) for one in compared)
    assert (table["error_s"] == table["predicted_s"] - table["measured_s"]).all()
    assert list(table["error_s"].abs()) == sorted(table["error_s"].abs(), reverse=True)


def test_steps_are_measured_again_kind_by_kind(compared, model):
    table = by_step(compared[:1], model, 60).set_index("kind")
    assert set(table.index) == {"lead and dense_pre", "attention", "dense_post", "experts", "head"}
    assert (table["measured_s"] > 0).all()
    assert model.config._attn_implementation == "qllm"


def test_at_the_speed_of_the_run_the_predicted_passes_take_what_the_real_ones_did(compared):
    for one in compared:
        slower = at_speed(one.steps, one.speed)
        predicted = sum(seconds_by(slower, p) for p in one.passes)
        assert predicted == pytest.approx(sum(p.measured for p in one.passes), rel=0.02)
        assert one.at_speed.status.tolist() == one.simulated.status.tolist()


def requests(world: str, ttft: list[float], finish: list[float]) -> pd.DataFrame:
    rows = {"policy": "fcfs", "rate": 1.0, "seed": 0, "world": world, "class": ["ls", "be"], "arrival_s": [0.0, 1.0]}
    rows |= {"ttft_s": ttft, "tpot_s": [0.1, 0.1], "finish_s": finish, "preemptions": [0, 1]}
    return pd.DataFrame(rows).assign(turnaround_s=lambda frame: frame["finish_s"] - frame["arrival_s"])


def test_errors_are_of_the_simulation_against_the_engine():
    worlds = [requests(REAL, [1.0, 2.0], [2.0, 5.0]), requests(SIMULATED, [1.1, 2.6], [2.0, 4.0])]
    table = errors(pd.concat([*worlds, requests(AT_SPEED, [1.0, 2.2], [2.0, 5.0])]))
    table = table.set_index(["class", "metric", "statistic"])
    assert table["error_at_speed"]["all", "ttft_s", "mean"] == pytest.approx(3.2 / 3 - 1)
    found = table["error"]
    assert found["ls", "ttft_s", "mean"] == pytest.approx(0.1)
    assert found["be", "ttft_s", "p99"] == pytest.approx(0.3)
    assert found["all", "ttft_s", "mean"] == pytest.approx(3.7 / 3 - 1)
    assert found["all", "tpot_s", "p50"] == 0
    assert found["all", "throughput_rps", "mean"] == pytest.approx(5 / 4 - 1)
    assert found["all", "preemptions", "sum"] == 0


def test_files_and_report(compared, model, tmp_path):
    save(compared, model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"requests.csv", "errors.csv", "spread.csv", "passes.csv", "steps.csv", "validation.png"}
    told = report(tmp_path)
    for word in ("fcfs", "qllm", "ttft p99", "throughput_rps", "decode passes", "experts"):
        assert word in told


def test_the_command(folder, tmp_path):
    arguments = ["validate", str(folder / "config.yaml"), "--model", str(folder / "model"), "--threads", "1"]
    arguments += ["--timings", str(folder / "timings.csv"), "--out", str(tmp_path), "--set", "policies=[fcfs]"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "largest contributions" in done.output
    assert (tmp_path / "validation.png").exists()


def test_the_command_refuses_the_timings_of_another_model(folder, tmp_path, model):
    assert model_facts(model)["experts"] == 8
    timings = Timings.load(folder / "timings.csv")
    affine_timings(layers=2, hidden=64, experts=16, dtype="float32", device=timings.device).save(tmp_path / "other.csv")
    arguments = ["validate", str(folder / "config.yaml"), "--model", str(folder / "model"), "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--timings", str(tmp_path / "other.csv"), "--out", str(tmp_path / "o")])
    assert "another model or device: experts is 16, used with 8" in str(done.exception)
