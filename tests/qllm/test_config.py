"""The configuration: every mistake is one line that names file, line and key, and says what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.run import runs
from tests.cli_support import CONFIG, write_config

# (what stands in the file, what is put there instead, the line that the error names, what else it must say)
BROKEN = {
    "unknown key": ("share: 0.25", "shaer: 0.25", 6, ["classes.ls.shaer", "did you mean 'share'", "priority, share"]),
    "unknown top key": ("limits:", "limts:", 17, ["limts", "did you mean 'limits'"]),
    "key twice": ("requests: 40", "requests: 40\nrequests: 50", 16, ["requests", "line 15 already"]),
    "share above 1": ("share: 0.25", "share: 1.25", 6, ["classes.ls.share", "less than or equal to 1", "1.25"]),
    "shares above 1": ("priority: 1", "share: 0.85", 3, ["classes", "add up to 1.1"]),
    "text for a number": ("share: 0.25", "share: lots", 6, ["classes.ls.share", "must be a number", "'lots'"]),
    "fractional tokens": ("fixed: 5}", "fixed: 5.5}", 8, ["classes.ls.output.fixed", "whole number", "5.5"]),
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
    "rate not a list": ("rate: [5, 50]", "rate: 5", 22, ["sweep.rate", "a list such as [1, 2]", "got 5"]),
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
    "mapping expected": (
        "{max_seqs: 8, max_batched_tokens: 2048}",
        "8",
        17,
        ["limits", "mapping with keys of max_seqs", "got 8"],
    ),
    "unknown timings": ("timings.csv", "a100-mixtral-8x7b-int3", 2, ["timings", "a100-mixtral-8x7b-int4", "or a path"]),
    "missing timings": ("timings.csv", "nowhere.csv", 2, ["timings", "no such file"]),
    "unknown popularity": ("requests: 40", "popularity: mixtrl-8x7b", 15, ["did you mean 'mixtral-8x7b'", "uniform"]),
    "value twice": ("rate: [5, 50]", "rate: [5, 50, 5.0]", 21, ["sweep", "rate: 5 stands twice"]),
    "null twice": (
        *("rate: [5, 50]", "rate: [5]\n  limits.kv_blocks: [null, 9, null]", 21),
        ["sweep", "limits.kv_blocks: none stands twice"],
    ),
    "file twice": (
        *("rate: [5, 50]", "rate: [5]\n  timings: [timings.csv, ./timings.csv]", 23),
        ["sweep.timings", "stands twice"],
    ),
    "name that leaves the folder": ("name: small", "name: ../../evil", 1, ["name", "plain file name", "letters"]),
    "name that hides": ("name: small", "name: .small", 1, ["name", "plain file name"]),
    "name of no letters": ("name: small", "name: ''", 1, ["name", "plain file name"]),
    "label that no figure shows": ("- fcfs", "- {name: fcfs, label: _x}", 19, ["policies.0.label", "printable"]),
    "label of formulas": ("- fcfs", "- {name: fcfs, label: $x$}", 19, ["policies.0.label", "without $"]),
    "class of formulas": ("  be:", "  $be$:", 3, ["classes", "'$be$'", "without $"]),
    "label of two lines": ("- fcfs", '- {name: fcfs, label: "a\\nb"}', 19, ["policies.0.label", "printable"]),
    "policy that is a number": ("- fcfs", "- 3", 19, ["policies.0", "the name of a policy", "got 3"]),
    "date": ("share: 0.25", "share: 2024-01-01", 6, ["classes.ls.share", "must be a number, got a date"]),
    "no such date": ("share: 0.25", "share: 2024-13-45", 6, ["not valid YAML", "month must be in 1..12"]),
    "octal": ("requests: 40", "requests: 010", 15, ["requests", "whole number", "'010'"]),
    "sixties": ("requests: 40", "requests: 1:30", 15, ["requests", "whole number", "'1:30'"]),
    "key that is a number": ("  ls:\n", "  1:\n", 4, ["classes.1", "text"]),
    "infinite": ("share: 0.25", "share: .inf", 6, ["classes.ls.share", "less than or equal to 1", "got inf"]),
    "no number": ("requests: 40", "rate: .nan\nrequests: 40", 15, ["rate", "must be", "got nan"]),
    "too many": ("requests: 40", "requests: 100000000000000000000", 15, ["requests", "less than"]),
    "alias of itself": ("seeds: 2", "seeds: &a [*a]", 16, ["alias (*) of what it stands in"]),
    "regular file": ("timings.csv", "/dev/null", 2, ["timings", "not a regular file: ", "dev/null"]),
    "folder": ("timings: timings.csv", "timings: ./", 2, ["timings", "is a folder: "]),
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
        ("sweep.requests=[null, 3]", ["sweep.requests.0: give requests (how many are sent) or duration"]),
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


@pytest.mark.parametrize("text", ["[", "{a: 1, a: 2}", "&a [*a]", 3000 * "[", "2024-13-45", "'\0'"])
def test_a_value_that_is_no_yaml_names_the_override(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set limits="):
        load_config(write_config(tmp_path), [f"limits={text}"])


def test_aliases_may_repeat_but_not_explode(tmp_path: Path) -> None:
    rows = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(ConfigError, match=r"more than 100,000 values"):
        load_config(write_config(tmp_path, "\n".join(rows)))
    shared = CONFIG.replace("{uniform: [10, 50]}", "&length {fixed: 5}").replace("{uniform: [200, 800]}", "*length")
    config = load_config(write_config(tmp_path, shared), ["classes.be.prompt.fixed=7"])
    assert [job.prompt.fixed for job in config.classes.values()] == [5, 7]


def test_a_number_without_end_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml:15: not valid YAML: Exceeds the limit") as caught:
        load_config(write_config(tmp_path, CONFIG.replace("requests: 40", "requests: " + 5000 * "1")))
    assert len(str(caught.value)) < 500


def test_what_cannot_be_a_configuration_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/dev/zero: not a regular file; expected a YAML"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match=r": is a folder; expected a YAML"):
        load_config(tmp_path)
    (tmp_path / "big.yaml").write_text("#" * (2 << 20))
    with pytest.raises(ConfigError, match=r"big.yaml: 2 MiB; allowed: .* at most 1 MiB"):
        load_config(tmp_path / "big.yaml")


SHORT = {
    "arrival: {process: poisson}": "arrival: poisson",
    "limits: {max_seqs: 8, max_batched_tokens: 2048}": "limits:",
    "output: {fixed: 5}": "output: 5",
    "prompt: {uniform: [200, 800]}": "prompt: azure_conv",
}


def test_short_forms_mean_the_long_ones(tmp_path: Path) -> None:
    long = CONFIG.replace("{max_seqs: 8, max_batched_tokens: 2048}", "{}")
    long = long.replace("{uniform: [200, 800]}", "{quantiles: azure_conv}")
    short = CONFIG
    for full, brief in SHORT.items():
        short = short.replace(full, brief)
    expected = load_config(write_config(tmp_path, long))
    assert load_config(write_config(tmp_path, short)) == expected
    assert load_config(write_config(tmp_path, short.replace("arrival: poisson", "arrival:"))) == expected


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("policies.0.label=mine", ("policies", 0, "label"), "mine"),
        ("policies.0.name=chunked", ("policies", 0, "name"), "chunked"),
        ("classes.ls.output.fixed=9", ("classes", "ls", "output", "fixed"), 9),
        ("arrival.process=poisson", ("arrival", "process"), "poisson"),
    ],
)
def test_keys_inside_a_short_form_can_be_set_and_swept(
    assignment: str, key: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    path = write_config(tmp_path, CONFIG.replace("{process: poisson}", "poisson").replace("{fixed: 5}", "5"))
    name = assignment.split("=")[0]
    swept = load_config(path, [f"sweep.{name}=[{value}]", "sweep.rate=[5]"])
    for config in (load_config(path, assignment), swept.at(swept.points()[0])):
        found = config.model_dump(by_alias=True)
        for part in key:
            found = found[part]
        assert found == value


def test_a_setting_of_a_policy_given_by_name_can_be_swept(tmp_path: Path) -> None:
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- chunked"))
    config = load_config(path, ["sweep.policies.0.budget=[64, 128]"])
    assert [config.at(point).policies[0].build().budget for point in config.points()] == [64, 128, 64, 128]


def test_swept_values_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path), ["sweep.limits.max_seqs=[4, 2000]", "sweep.limits.max_batched_tokens=[1000, 2048]"]
    )
    wrong = next(point for point in config.points() if point["limits.max_seqs"] > point["limits.max_batched_tokens"])
    with pytest.raises(ConfigError, match=r"sweep: at rate=5, limits.max_seqs=2000, .*: limits: max_batched_tokens"):
        config.at(wrong)


def test_a_sweep_without_end_is_refused(tmp_path: Path) -> None:
    values = ", ".join(map(str, range(1, 400)))
    keys = ["rate", "limits.max_seqs", "max_step"]
    with pytest.raises(ConfigError, match=r"the sweep has \d[\d,]+ simulations; allowed: 100,000"):
        load_config(write_config(tmp_path), [f"sweep.{key}=[{values}]" for key in keys])
    with pytest.raises(ConfigError, match=r"seeds: must be less than or equal to 100000"):
        load_config(write_config(tmp_path), "seeds=1000000000")


def test_swept_files_start_at_the_configurations_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("from qllm.scheduler import Policy\n\nclass Mine(Policy):\n    pass\n")
    path = write_config(tmp_path)
    monkeypatch.chdir("/")
    swept = ["sweep.timings=[timings.csv, a100-mixtral-8x7b-int4]", "sweep.policies.0=[fcfs, {file: mine.py}]"]
    config = load_config(path, swept)
    assert config.sweep["timings"] == [str(tmp_path / "timings.csv"), "a100-mixtral-8x7b-int4"]
    assert config.sweep["policies.0"] == ["fcfs", {"file": str(tmp_path / "mine.py")}]
    assert {run.cells["timings"] for run in runs(config)} == {"timings.csv", "a100-mixtral-8x7b-int4"}
    assert {run.cells["policies.0"] for run in runs(config)} == {"fcfs", "{file: mine.py}"}


#: What pydantic says, and no user should read.
RAW = re.compile(r"[Ii]nput should|valid (integer|number|string|list|dict|bool)|instance of|pydantic|\[type=|Traceback")
ODD = [
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    ".nan",
    "-.inf",
    "1e400",
    "''",
    "x",
    "[]",
    "[x]",
    "[[1]]",
    "{}",
    "{x: 1}",
    "{1: 2}",
]
ODD += ["2024-01-01", "!!binary eA==", "!!set {x}", "100000000000000000000000"]
KEYS = [
    "name",
    "timings",
    "popularity",
    "expert_mode",
    "max_step",
    "classes",
    "classes.ls",
    "arrival",
    "rate",
    "limits",
]
KEYS += ["classes.ls.priority", "classes.ls.share", "classes.ls.prompt", "classes.ls.lengths", "classes.ls.slo.ttft"]
KEYS += ["classes.ls.prompt.uniform", "classes.ls.prompt.lognormal", "classes.ls.prompt.trace", "classes.ls.slo"]
KEYS += ["arrival.process", "arrival.cv", "limits.max_seqs", "limits.evict", "limits.urgent_share", "policies", "seeds"]
KEYS += ["policies.0", "policies.0.label", "policies.0.file", "policies.1.fill_tokens", "requests", "duration", "sweep"]
KEYS += [
    "sweep.rate",
    "sweep.limits.kv_blocks",
    "sweep.policies.1.fill_tokens",
    "provenance",
    "nonsense",
    "limits.nonsense",
]


@pytest.mark.parametrize("key", KEYS)
def test_no_odd_value_gets_more_than_one_line_in_the_projects_words(key: str, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    answers = [answer for value in ODD if (answer := refusal(path, f"{key}={value}"))]
    assert len(answers) >= 5
    for answer in answers:
        assert "\n" not in answer
        assert not RAW.search(answer), answer
        assert answer.startswith(("--set ", str(path)))


def refusal(path: Path, assignment: str) -> str | None:
    """What is said of a configuration with that override; None if it is valid."""
    try:
        load_config(path, [assignment])
    except ConfigError as error:
        return str(error)
    return None


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


@pytest.mark.parametrize("name", ["paper", "long_prefill", "azure", "three_classes"])
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
