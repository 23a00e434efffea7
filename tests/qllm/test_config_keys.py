"""The reference of configuration keys: all of them, explained, and the page is not older than the models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qllm.config.config import load_config
from qllm.config.keys import config_keys, markdown
from qllm.config.yaml_lines import ConfigError
from tests.cli_support import qllm, write_config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python tools/config_page.py"


def test_every_key_is_explained_and_can_be_written(tmp_path: Path) -> None:
    keys = config_keys()
    assert [key.name for key in keys if not (key.meaning and key.allowed and key.default)] == []
    assert len({key.name for key in keys}) == len(keys)
    path = write_config(tmp_path)
    for key in keys:
        name = key.name.split(" ")[0].replace("NAME", "ls").replace(".N.", ".1.")
        with pytest.raises(ConfigError) as caught:
            load_config(path, f"{name}=!!binary eA==")  # no value that any key takes
        assert "unknown key" not in str(caught.value) or name.startswith("arrival.")


def test_defaults_bounds_and_units_are_there() -> None:
    by_name = {key.name: key for key in config_keys()}
    assert by_name["limits.max_seqs"][1:] == ("whole number >= 1", "32", "sequences in a pass")
    processes = "poisson | gamma | onoff | phases | clients | servegen | trace | batch | closed | conversations"
    assert by_name["arrival.process"].allowed == processes
    assert by_name["policies.N.weights (slack)"].allowed == "mapping | null"
    assert by_name["timings"].default == "required"
    assert by_name["arrival"].default == "poisson"
    assert by_name["classes.NAME.slo.ttft"].meaning == "seconds"
    assert by_name["policies.N.budget (hybrid)"].default == "2048"
    assert by_name["policies.N.max_suspended_s (hybrid)"].meaning.endswith("null: no bound.")


def test_the_command_prints_them() -> None:
    told = qllm("config", "keys", "limits").stdout
    assert "limits.kv_blocks" in told
    assert "classes" not in told
    rows = json.loads(qllm("config", "keys", "--format", "json").stdout)
    assert [row["name"] for row in rows] == [key.name for key in config_keys()]
    wrong = qllm("config", "keys", "limts")
    assert wrong.returncode == 2
    assert "did you mean 'limits'?" in wrong.stderr
