"""The configuration: every mistake is one line that names file, line and key, and says what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from tests.cli_support import CONFIG, write_config

# (what stands in the file, what is put there instead, the line that the error names, what else it must say)
BROKEN = {
    "unknown key": ("share: 0.25", "shaer: 0.25", 6, ["classes.ls.shaer", "did you mean 'share'", "priority, share"]),
    "unknown top key": ("limits:", "limts:", 17, ["limts", "did you mean 'limits'"]),
    "key twice": ("requests: 40", "requests: 40\nrequests: 50", 16, ["requests", "line 15 already"]),
    "share above 1": ("share: 0.25", "share: 1.25", 6, ["classes.ls.share", "less than or equal to 1", "1.25"]),
    "shares above 1": ("priority: 1", "share: 0.85", 3, ["classes", "add up to 1.1"]),
    "text for a number": ("share: 0.25", "share: lots", 6, ["classes.ls.share", "valid number", "'lots'"]),
    "fractional tokens": ("fixed: 5}", "fixed: 5.5}", 8, ["classes.ls.output.fixed", "integer", "5.5"]),
    "no tokens": ("fixed: 5}", "fixed: 0}", 8, ["classes.ls.output.fixed", "greater than or equal to 1", "got 0"]),
    "unknown length": ("{fixed: 5}", "{fixd: 5}", 8, ["classes.ls.output.fixd", "did you mean 'fixed'", "lognormal"]),
    "two lengths": ("{fixed: 5}", "{fixed: 5, quantiles: azure_conv}", 8, ["classes.ls.output", "one of", "quantiles"]),
    "crossed range": ("[10, 50]", "[50, 10]", 7, ["classes.ls.prompt", "low (50)", "high (10)"]),
    "unknown quantiles": ("{fixed: 5}", "{quantiles: azur_conv}", 8, ["quantiles", "did you mean 'azure_conv'"]),
    "no length": ("    output: {fixed: 5}\n", "", None, ["class ls needs prompt and output"]),
    "zero SLO": ("ttft: 0.05", "ttft: 0", 9, ["classes.ls.slo.ttft", "greater than 0"]),
    "empty SLO": ("{ttft: 0.05}", "{}", 9, ["classes.ls.slo", "ttft_over_isolated"]),
    "unknown process": (
        "process: poisson",
        "process: poison",
        14,
        ["arrival.process", "did you mean 'poisson'", "onoff"],
    ),
    "no process": ("{process: poisson}", "{cv: 2}", 14, ["arrival", "'process' is missing"]),
    "missing setting": ("process: poisson", "process: gamma", 14, ["arrival.cv", "missing"]),
    "setting of another process": (
        "process: poisson",
        "process: poisson, cv: 2",
        14,
        ["arrival.cv", "allowed: process"],
    ),
    "burst beyond reach": (
        *("process: poisson", "process: onoff, on_s: 1, off_s: 1, burst: 3", 14),
        ["arrival", "burst (3.0) must lie between 1 and", "= 2"],
    ),
    "missing trace": (
        "process: poisson",
        "process: trace, file: azure.csv",
        14,
        ["no such file", "AzurePublicDataset"],
    ),
    "negative rate": ("rate: [5, 50]", "rate: [5, -50]", 22, ["sweep.rate.1", "greater than 0", "-50"]),
    "rate not a list": ("rate: [5, 50]", "rate: 5", 22, ["sweep.rate", "valid list", "got 5"]),
    "empty sweep": ("rate: [5, 50]", "rate: []", 21, ["sweep", "rate has no values"]),
    "unknown swept key": ("rate: [5, 50]", "raet: [5]", 22, ["sweep.raet", "did you mean 'rate'"]),
    "unknown inner swept key": (
        *("rate: [5, 50]", "rate: [5]\n  limits.max_seq: [4]", 23),
        ["sweep.limits.max_seq", "did you mean 'max_seqs'"],
    ),
    "bad swept value": ("rate: [5, 50]", "rate: [5]\n  limits.max_seqs: [8, 0]", 23, ["sweep.limits.max_seqs.1", "0"]),
    "unknown policy": ("- fcfs", "- fcsf", 19, ["policies.0", "did you mean 'fcfs'", "chunked", "layer"]),
    "unknown setting": ("fill_tokens: 0", "fill_token: 0", 20, ["policies.1", "'fill_token'", "resume"]),
    "bad setting": ("fill_tokens: 0", "fill_tokens: -1", 20, ["policies.1", "fill_tokens", "at least 0"]),
    "setting neither true nor false": ("fill_tokens: 0", "merge: 1", 20, ["policies.1", "merge is 1", "true or false"]),
    "merge between layers": ("qllm, fill_tokens: 0", "layer, merge: true", 20, ["policies.1", "no setting 'merge'"]),
    "policy twice": ("- fcfs", "- qllm", 18, ["policies", "two policies are called 'qllm'", "label"]),
    "missing policy file": ("- fcfs", "- {file: nowhere.py}", 19, ["policies.0.file", "no such file", "nowhere.py"]),
    "class without file": ("- fcfs", "- {name: fcfs, class: Mine}", 19, ["policies.0", "no file is given"]),
    "no policies": ("  - fcfs\n  - {name: qllm, fill_tokens: 0}\n", "  []\n", 18, ["policies", "at least one"]),
    "no classes at all": (
        CONFIG[CONFIG.index("classes:") : CONFIG.index("arrival:")],
        "",
        None,
        ["classes", "missing"],
    ),
    "seeds twice": ("seeds: 2", "seeds: [1, 1]", 16, ["seeds", "different seeds"]),
    "no seeds": ("seeds: 2", "seeds: 0", 16, ["seeds", "greater than or equal to 1"]),
    "nothing sent": ("requests: 40\n", "", None, ["give requests", "duration"]),
    "both ends": ("requests: 40", "requests: 40\nduration: 3", None, ["requests or duration, not both"]),
    "limits that clash": (
        "max_batched_tokens: 2048",
        "max_batched_tokens: 4",
        17,
        ["limits", "max_batched_tokens (4)", "max_seqs (8)"],
    ),
    "mapping expected": ("{max_seqs: 8, max_batched_tokens: 2048}", "8", 17, ["limits", "mapping", "a number"]),
    "unknown timings": ("timings.csv", "a100-mixtral-8x7b-int3", 2, ["timings", "a100-mixtral-8x7b-int4", "or a path"]),
    "missing timings": ("timings.csv", "nowhere.csv", 2, ["timings", "no such file"]),
    "unknown popularity": ("requests: 40", "popularity: mixtrl-8x7b", 15, ["did you mean 'mixtral-8x7b'", "uniform"]),
    "not YAML": ("arrival: {", "arrival: [", 14, ["not valid YAML"]),
    "tab": ("arrival:", "\tarrival:", 14, ["not valid YAML"]),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_mistake_is_one_line_with_place_and_what_is_allowed(mistake: str, tmp_path: Path) -> None:
    old, new, line, expected = BROKEN[mistake]
    assert old in CONFIG
    path = write_config(tmp_path, CONFIG.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: "), message
    if line:
        assert path.read_text().splitlines()[line - 1].strip() in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("sweep.rate=[1,-2]", ["sweep.rate.1", "greater than 0"]),
        ("limits.max_seq=3", ["did you mean 'max_seqs'"]),
        ("limits.max_seqs.deep=3", ["limits.max_seqs is a number"]),
        ("policies.9.label=x", ["list of 2", "0 to 1"]),
        ("policies.1.fill_tokens=many", ["fill_tokens", "'many'"]),
        ("rate", ["key=value"]),
        ("rate=[", ["not valid YAML"]),
    ],
)
def test_mistaken_override_names_itself(assignment: str, expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path), [assignment])
    message = str(caught.value)
    assert message.startswith(f"--set {assignment}: ")
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_overrides_win_over_the_file_and_may_be_exponents(tmp_path: Path) -> None:
    overrides = ["sweep.rate=[1, 2, 4]", "max_step=1e-3", "policies.1.label=mine", "sweep.limits.max_seqs=[4, 8]"]
    config = load_config(write_config(tmp_path), overrides)
    assert config.sweep == {"rate": [1, 2, 4], "limits.max_seqs": [4, 8]}
    assert config.max_step == 1e-3
    assert [policy.title for policy in config.policies] == ["fcfs", "mine"]


def test_points_are_every_combination_with_the_first_key_slowest(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["sweep.limits.max_seqs=[4, 8]"])
    found = [(point["rate"], point["limits.max_seqs"]) for point in config.points()]
    assert found == [(5, 4), (5, 8), (50, 4), (50, 8)]
    at_point = config.at(config.points()[3])
    assert (at_point.rate, at_point.limits.max_seqs, at_point.sweep) == (50, 8, {})


def test_paths_start_at_the_configurations_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(tmp_path)
    monkeypatch.chdir("/")
    assert load_config(path).timings == str(tmp_path / "timings.csv")


def test_no_file_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nowhere.yaml")
    for text, expected in (("", "empty"), ("- 1\n", "expected a mapping"), ("\xff", "expected a mapping")):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(ConfigError, match=expected):
            load_config(tmp_path / "odd.yaml")


@pytest.mark.parametrize("name", ["paper", "long_prefill", "azure"])
def test_shipped_configurations_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    try:
        config = load_config(path)
    except ConfigError as error:
        if "AzurePublicDataset" not in str(error):  # the trace is not part of the project
            raise
        pytest.skip(str(error))
    assert config.name == name
    assert all(line.count("#") for line in path.read_text().splitlines()[:3])
