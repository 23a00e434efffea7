"""limits.prefix_cache of a configuration: traces with hash_ids, conversations, what results and the engine say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qllm.config.config import Config, load_config
from qllm.config.workload import request_trace
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.run import runs, simulate_run
from qllm.experiment.sweep import simulate
from tests.cli_support import qllm

CACHED = ["limits.prefix_cache=true"]


def configured(folder: Path, arrival: str, more: str = "", job: str = "{prompt: 100, output: 30}") -> Path:
    path = folder / "prefixes.yaml"
    path.write_text(
        f"timings: a100-qwen3-30b-a3b-bf16\nclasses: {{all: {job}}}\npolicies: [fcfs]\narrival: {arrival}\n{more}"
    )
    return path


def mooncake(folder: Path, gap_ms: int = 60_000) -> Path:
    """Three documents of 4,096 tokens, each with four questions of 512 tokens, one after the other."""
    rows = []
    for i in range(12):
        document = [100 * (i % 3) + n for n in range(8)]
        rows.append(
            {"timestamp": i * gap_ms, "input_length": 4608, "output_length": 10, "hash_ids": [*document, 900 + i]}
        )
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return configured(folder, "{process: trace, file: trace.jsonl}", job="{}")


def result(config: Config):
    run = runs(config)[0]
    return simulate_run(run, request_trace(config, run.seed))


@pytest.mark.filterwarnings("ignore:.*hash_ids")
def test_what_earlier_prompts_have_in_common_is_not_computed_again(tmp_path):
    path = mooncake(tmp_path)
    plain, cached = (simulate(load_config(path, changes)).requests for changes in ((), CACHED))
    assert cached["cached_tokens"].tolist() == 3 * [0] + 9 * [4096]
    assert "cached_tokens" not in plain
    ttft = [table["first_token_s"] - table["arrival_s"] for table in (plain, cached)]
    assert np.allclose(ttft[0][:3], ttft[1][:3])
    assert (ttft[1][3:] < 0.4 * ttft[0][3:]).all(), "512 tokens over 4,096, not 4,608"
    summary = simulate(load_config(path, CACHED)).summary
    assert summary["cached_share"].tolist() == [pytest.approx(9 * 4096 / (12 * 4608))]
    assert simulate(path).summary["cached_share"].isna().all()


@pytest.mark.filterwarnings("ignore:.*hash_ids")
def test_the_least_recently_used_prompt_goes_first_where_memory_is_short(tmp_path):
    """Room for two and a half documents: each of three in turn finds that its own has just gone, but for a part."""
    short = result(load_config(mooncake(tmp_path), [*CACHED, "limits.kv_blocks=700"]))
    assert short.cached.max() < 4096
    assert result(load_config(tmp_path / "prefixes.yaml", [*CACHED, "limits.kv_blocks=1200"])).cached.sum() == 9 * 4096


def test_a_turn_of_a_conversation_computes_what_is_new(tmp_path):
    path = configured(tmp_path, "{process: conversations, turns: 3}", "rate: 0.05\nrequests: 12\n")
    found = result(load_config(path, CACHED))
    # 100, then 100 + 30 + 100, then 230 + 30 + 100 tokens; of what was said the last token has no KV, the block is cut
    assert found.cached.tolist() == 4 * [0, 128, 256]
    assert simulate(path).summary["cached_share"].isna().all()


@pytest.mark.filterwarnings("ignore:.*hash_ids")
def test_each_gpu_has_a_cache_of_its_own(tmp_path):
    found = result(load_config(mooncake(tmp_path), [*CACHED, "replicas=2", "router=round_robin"]))
    assert found.replica.tolist() == 6 * [0, 1]
    assert found.cached.tolist() == 6 * [0] + 6 * [4096]


@pytest.mark.filterwarnings("ignore:.*hash_ids")
def test_a_router_sends_a_prompt_where_its_beginning_is(tmp_path):
    """Two GPUs with room for two documents each: behind this router they hold all three, and else they drop them."""
    several = [*CACHED, "replicas=2", "limits.kv_blocks=610"]
    config = load_config(mooncake(tmp_path), [*several, "router=prefix_aware"])
    found = result(config)
    assert found.cached.tolist() == 3 * [0] + 9 * [4096]
    assert found.replica.tolist() == 4 * [0, 1, 0]
    assert result(load_config(tmp_path / "prefixes.yaml", [*several, "router=round_robin"])).cached.sum() < 9 * 4096


@pytest.mark.filterwarnings("ignore:.*hash_ids")
def test_a_router_goes_elsewhere_where_too_much_waits(tmp_path):
    """All at once: computing the document twice takes less than waiting for those in front."""
    found = result(load_config(mooncake(tmp_path, gap_ms=0), [*CACHED, "replicas=2", "router=prefix_aware"]))
    assert 4 <= found.replica.sum() <= 8


def test_without_a_word_of_prefixes_there_is_no_cache(tmp_path):
    config = load_config(configured(tmp_path, "poisson", "rate: 1\nrequests: 4\n"), CACHED)
    with pytest.raises(ConfigError, match=r"limits.prefix_cache: no request says .*; allowed: true for a trace with"):
        request_trace(config, 0)


def test_the_engine_says_that_it_has_none(tmp_path):
    told = qllm(
        "run", configured(tmp_path, "{process: conversations, turns: 2}", "rate: 1\nrequests: 4\n"), "--set", *CACHED
    )
    assert told.returncode == 2
    assert "limits.prefix_cache: is simulated only; allowed: false on the engine" in told.stderr
