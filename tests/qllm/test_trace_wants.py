"""Bounds, tenants and tags of a recorded trace: from its columns to the policy, simulated and on the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qllm.config.config import Config, load_config
from qllm.config.workload import request_trace
from qllm.experiment.results import Results, load_results
from qllm.experiment.run import run_table, runs
from qllm.experiment.sweep import simulate
from qllm.scheduler import Request, make_policy
from qllm.scheduler.policies.slack import Slack
from qllm.traces.requests.readers import read_requests
from qllm.traces.wants import WANTS
from tests.cli_support import qllm, write_config

ROWS = """\
arrival_s,prompt_tokens,output_tokens,class,max_ttft_s,max_tpot_s,tenant,tags
0,900,4,ls,,,a,
0.001,301,3,ls,9,,a,
0.001,302,3,ls,5,0.5,a,lane=x
0.001,303,3,ls,,,a,lane=y;deep=1
0.001,304,3,ls,1,0.5,b,lane=x
0.001,305,3,be,,,,
"""
WANTED = {
    900: {"tenant": "a"},
    301: {"tenant": "a", "max_ttft_s": 9.0},
    302: {"tenant": "a", "max_ttft_s": 5.0, "max_tpot_s": 0.5, "tags": {"lane": "x"}},
    303: {"tenant": "a", "tags": {"lane": "y", "deep": "1"}},
    304: {"tenant": "b", "max_ttft_s": 1.0, "max_tpot_s": 0.5, "tags": {"lane": "x"}},
    305: {},
}
CONFIG = """\
name: recorded
timings: timings.csv
classes: {ls: {priority: 0, slo: {ttft: 1.0}}, be: {priority: 1}}
arrival: {process: trace, file: trace.csv}
limits: {max_seqs: 1, max_batched_tokens: 2048}
policies: [slack]
"""


def config_of(folder: Path, *changes: str, rows: str = ROWS) -> Config:
    (folder / "trace.csv").write_text(rows)
    return load_config(write_config(folder, CONFIG), list(changes))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that `slack` is asked about, in the order of their coming."""
    seen: list[Request] = []
    original = Slack.order

    def order(self: Slack, r: Request) -> object:
        seen.append(r)
        return original(self, r)

    monkeypatch.setattr(Slack, "order", order)
    return seen


def assert_as_wanted(heard: list[Request]) -> None:
    plain = Request(0, 1, 1)
    assert [r.prompt_tokens for r in heard] == list(WANTED)
    for r in heard:
        for name in WANTS:
            assert getattr(r, name) == WANTED[r.prompt_tokens].get(name, getattr(plain, name)), (r.prompt_tokens, name)


def test_the_scheduler_of_a_simulation_hears_all(tmp_path: Path, heard: list[Request]) -> None:
    run_table(runs(config_of(tmp_path))[0])
    assert_as_wanted(heard)


@pytest.mark.parametrize("column", list(WANTS))
def test_one_column_alone_is_heard_too(tmp_path: Path, heard: list[Request], column: str) -> None:
    table = pd.read_csv(pd.io.common.StringIO(ROWS), keep_default_na=False)
    others = [name for name in WANTS if name != column]
    run_table(runs(config_of(tmp_path, rows=table.drop(columns=others).to_csv(index=False)))[0])
    plain = Request(0, 1, 1)
    for r in heard:
        assert getattr(r, column) == WANTED[r.prompt_tokens].get(column, getattr(plain, column))
        assert all(getattr(r, name) == getattr(plain, name) for name in others)


def test_the_scheduler_of_an_engine_hears_all(tmp_path: Path, heard: list[Request], one_thread: None) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from qllm.executor import Engine, VirtualClock, replay
    from qllm.executor.model.loading import prepare_model
    from qllm.executor.testing import tiny_model
    from qllm.scheduler import Limits
    from qllm.traces.step_times.cost_model import PassCostModel
    from qllm.traces.step_times.testing import affine_timings

    config = config_of(tmp_path)
    trace = request_trace(config, 0)
    model = prepare_model(tiny_model("qwen3_moe", num_hidden_layers=1, max_position_embeddings=1024))
    clock = VirtualClock(PassCostModel(affine_timings(layers=1, experts=8, top_k=2)))
    with Engine(model, policy=make_policy("slack"), limits=Limits(kv_blocks=200), clock=clock) as engine:
        replay(engine, trace, priorities=config.priorities)
    assert_as_wanted(heard)


def order_of_first_tokens(config: Config) -> list[int]:
    table = run_table(runs(config)[0])
    ls = table[table["class"] == 0]
    return ls.sort_values("first_token_s")["prompt_tokens"].tolist()


def test_slack_serves_by_the_bounds_and_the_tenants_of_a_trace(tmp_path: Path) -> None:
    by_arrival = order_of_first_tokens(config_of(tmp_path))
    assert by_arrival == [900, 301, 302, 303, 304]
    by_bound = order_of_first_tokens(config_of(tmp_path, "policies=[{name: slack, order: deadline}]"))
    assert by_bound == [900, 304, 302, 301, 303], "those without a bound last"
    by_tenant = order_of_first_tokens(config_of(tmp_path, "policies=[{name: slack, order: fair}]"))
    assert by_tenant == [900, 304, 301, 302, 303], "tenant b has had nothing yet"


def test_a_request_s_own_bound_comes_before_that_of_its_class(tmp_path: Path) -> None:
    trace = request_trace(config_of(tmp_path, "classes.ls.deadline={ttft: 3, tpot: 0.2}"), 0)
    assert trace.max_ttft_s is not None
    assert trace.max_tpot_s is not None
    assert trace.max_ttft_s.tolist() == [3, 9, 5, 3, 1, np.inf]
    assert trace.max_tpot_s.tolist() == [0.2, 0.2, 0.5, 0.2, 0.5, np.inf]
    assert trace.tenants == ("a", "a", "a", "a", "b", "")
    other = request_trace(config_of(tmp_path, "classes.be.deadline={ttft: 7}"), 0)
    assert other.max_ttft_s is not None
    assert other.max_ttft_s.tolist() == [np.inf, 9, 5, np.inf, 1, 7], "another class's deadline takes nobody's away"


@pytest.mark.parametrize(
    "changes",
    [
        ("arrival.spread=true",),
        ("requests=4",),
        ("duration=0.0005",),
        ("rate=20",),
        ("arrival.spread=true", "requests=5", "rate=3", "classes.ls.deadline={ttft: 100}"),
    ],
)
def test_however_a_configuration_replays_it_each_request_keeps_its_own(tmp_path: Path, changes: tuple[str]) -> None:
    trace = request_trace(config_of(tmp_path, *changes), 0)
    for i, prompt in enumerate(trace.prompt_tokens.tolist()):
        assert WANTED[prompt].items() <= trace.wants(i).items()


def test_drawn_classes_leave_the_rest_alone(tmp_path: Path) -> None:
    rows = "\n".join(",".join(line.split(",")[:3] + line.split(",")[4:]) for line in ROWS.splitlines())
    trace = request_trace(config_of(tmp_path, "classes.ls.share=0.5", rows=rows), 0)
    assert trace.classes == ("ls", "be")
    assert trace.tenants == ("a", "a", "a", "a", "b", "")


def test_the_documents_show_a_trace_with_every_column(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    text = page.partition("```csv\n")[2].partition("```")[0]
    (tmp_path / "shown.csv").write_text(text)
    trace = read_requests(tmp_path / "shown.csv")
    assert {*trace.wanted()} == {*WANTS}
    assert trace.wants(2) == {
        "max_ttft_s": 2.0,
        "max_tpot_s": np.inf,
        "tenant": "ben",
        "tags": {"lane": "chat", "region": "eu"},
    }


# ---- results --------------------------------------------------------------------------------------------------------


def test_results_keep_what_requests_want(tmp_path: Path) -> None:
    config = config_of(tmp_path, "policies=[fcfs, slack]")
    results = simulate(config)
    assert isinstance(results, Results)
    again = load_results(results.save(tmp_path / "out"))
    for found in (results, again):
        table = found.requests[found.requests["policy"] == "slack"].set_index("prompt_tokens")
        assert table["max_ttft_s"].dropna().to_dict() == {301: 9.0, 302: 5.0, 304: 1.0}
        assert table["max_tpot_s"].dropna().to_dict() == {302: 0.5, 304: 0.5}
        assert table["tenant"].tolist() == ["a", "a", "a", "a", "b", ""]
        assert table["tags"].tolist() == ["", "", "lane=x", "lane=y;deep=1", "lane=x", ""]
        own = found.counted[found.counted["max_ttft_s"].notna()]
        kept = (own["ttft_s"] <= own["max_ttft_s"]).groupby([own["policy"], own["tenant"]], observed=True).mean()
        assert set(kept.index) == {(policy, tenant) for policy in ("fcfs", "slack") for tenant in ("a", "b")}
    pd.testing.assert_frame_equal(results.requests, again.requests, check_categorical=False)


def test_the_slo_of_a_class_judges_whatever_its_requests_want(tmp_path: Path) -> None:
    columns = ["class", "slo_attainment", "goodput_rps"]
    bare = "\n".join(",".join(line.split(",")[:4]) for line in ROWS.splitlines())
    found = [simulate(config_of(tmp_path, "policies=[fcfs]", rows=rows)).summary[columns] for rows in (ROWS, bare)]
    pd.testing.assert_frame_equal(*found)


def test_results_of_a_trace_without_them_have_no_such_columns(tmp_path: Path) -> None:
    bare = "\n".join(",".join(line.split(",")[:4]) for line in ROWS.splitlines())
    assert not {*WANTS} & set(simulate(config_of(tmp_path, rows=bare)).requests)


def test_runs_with_and_without_them_stand_in_one_table(tmp_path: Path) -> None:
    rows = ROWS.replace("0,900,4,ls,,,a,", "0,900,4,ls,,,,").replace("0.001,301,3,ls,9,,a,", "0.001,301,3,ls,9,,,")
    results = simulate(config_of(tmp_path, "sweep.requests=[2,6]", rows=rows))
    assert results.requests["tenant"].tolist() == ["", "", "", "", "a", "a", "b", ""]
    assert results.requests["tags"].tolist()[:2] == ["", ""]
    assert results.requests["max_tpot_s"].isna().tolist() == [True] * 4 + [False, True, False, True]


# ---- the command line -----------------------------------------------------------------------------------------------


def test_trace_make_and_describe(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(ROWS)
    told = qllm("trace", "describe", tmp_path / "trace.csv")
    assert told.returncode == 0, told.stderr
    assert "max_ttft_s   of 3 requests: min 1  p50 5  max 9\n" in told.stdout
    assert "max_tpot_s   of 2 requests: min 0.5  p50 0.5  max 0.5\n" in told.stdout
    assert "tenants      2, of 5 requests\n" in told.stdout
    assert "tags         requests with lane: 3, deep: 1\n" in told.stdout
    as_json = json.loads(qllm("trace", "describe", tmp_path / "trace.csv", "--json").stdout)
    assert as_json["tags"] == {"lane": 3, "deep": 1}
    out = tmp_path / "made.jsonl"
    made = qllm("trace", "make", out, "--from", tmp_path / "trace.csv", "--requests", 5, "--rate", 2, "--spread")
    assert made.returncode == 0, made.stderr
    trace = read_requests(out)
    for i, prompt in enumerate(trace.prompt_tokens.tolist()):
        assert WANTED[prompt].items() <= trace.wants(i).items()
