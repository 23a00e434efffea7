"""Policies that a configuration names: those that ship, and a user's own Python file."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from qllm.config import policies
from qllm.config.policies import file_policy, named_policy
from qllm.config.yaml_lines import ConfigError
from qllm.experiment.sweep import simulate
from tests.cli_support import CONFIG, write_config

SHORTEST = """\
from qllm.scheduler import Policy

class ShortestFirst(Policy):
    def __init__(self, longest: int = 10**6):
        self.longest = longest

    def order(self, r):
        return (min(r.prompt_tokens, self.longest), r.id)
"""


def write_policy(folder: Path, text: str = SHORTEST) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_policy_file_is_loaded_with_its_settings(tmp_path: Path) -> None:
    policy = file_policy(write_policy(tmp_path), None, {"longest": 7})
    assert type(policy).__name__ == "ShortestFirst"
    assert vars(policy) == {"longest": 7}


def test_a_policy_file_decides(tmp_path: Path) -> None:
    write_policy(tmp_path)
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py, label: short}\n  - fcfs"))
    done = simulate(path, set=["sweep.rate=[2000]", "seeds=1", "limits.max_seqs=1"]).requests
    order = {name: rows.sort_values("first_launch_s")["id"].tolist() for name, rows in done.groupby("policy")}
    prompts = done[done["policy"] == "short"].set_index("id")["prompt_tokens"]
    queued = [prompts[i] for i in order["short"][10:]]  # all have arrived by then
    assert queued == sorted(queued)
    assert order["fcfs"] == sorted(order["fcfs"])


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("def broken(:\n", {}, ["mine.py:1", "SyntaxError"]),
        ("import nothing_of_that_name\n", {}, ["mine.py:1", "ModuleNotFoundError"]),
        ("x = 1\n", {}, ["one subclass of qllm.scheduler.Policy", "none"]),
        (SHORTEST + "class Other(ShortestFirst):\n    pass\n", {}, ["2 of them", "ShortestFirst, Other", "class:"]),
        (SHORTEST, {"lengest": 3}, ["mine.py", "lengest", "longest"]),
        (
            SHORTEST + "    granularity = 'token'\n",
            {},
            ["mine.py", "granularity is 'token'", "iteration, layer, expert"],
        ),
        (SHORTEST + "    merge = 'no'\n", {}, ["mine.py", "merge is 'no'", "true or false"]),
        (SHORTEST.replace("= longest", "= 1 / 0"), {}, ["mine.py:5", "ZeroDivisionError"]),
    ],
)
def test_a_broken_policy_file_is_one_line(text: str, settings: dict, expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        file_policy(write_policy(tmp_path, text), None, settings)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_class_chooses_among_several(tmp_path: Path) -> None:
    path = write_policy(tmp_path, SHORTEST + "class Other(ShortestFirst):\n    pass\n")
    assert type(file_policy(path, "Other", {})).__name__ == "Other"
    with pytest.raises(ConfigError, match=r"did you mean 'Other'"):
        file_policy(path, "Othr", {})


def test_a_policy_that_breaks_while_it_runs_is_named_with_its_line(tmp_path: Path) -> None:
    write_policy(tmp_path, SHORTEST.replace("return (min", "raise ValueError('no idea')\n        return (min"))
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    with pytest.raises(ConfigError, match=r"policy mine at rate=5, seed=0: .*mine\.py:8: ValueError: no idea"):
        simulate(path, set=["policies=[{file: mine.py}]"])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'qllm'.*fcfs, priority"):
        named_policy("qlm", {})


STUCK = {
    "select": "    def select(self, s, batch, now):\n        while True:\n            pass\n",
    "level": "    def level(self, r):\n        import time\n        time.sleep(1000)\n",
    "__init__": "    def __init__(self):\n        while True:\n            pass\n",
    "<module>": "    while True:\n        pass\n",
}


@pytest.mark.parametrize("call", STUCK)
def test_a_policy_that_never_returns_is_stopped_and_named(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "STUCK_S", 0.2)
    write_policy(tmp_path, "from qllm.scheduler import Policy\n\nclass Mine(Policy):\n" + STUCK[call])
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    with pytest.raises(ConfigError, match=rf"mine\.py:[4-6]: TimeoutError: ({call}|Mine) has not returned for 0.2 s"):
        simulate(path, set=["policies=[{file: mine.py}]"])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_policy_that_takes_long_in_all_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "STUCK_S", 0.02)
    write_policy(tmp_path, SHORTEST.replace("return (min", "__import__('time').sleep(0.005)\n        return (min"))
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    done = simulate(path, set=["policies=[{file: mine.py}]", "sweep.rate=[50]", "seeds=1"])
    assert (done.requests["status"] == "finished").all()


@pytest.mark.parametrize(
    "where", ["    raise SystemExit(0)\n", "    def level(self, r):\n        raise SystemExit(0)\n"]
)
def test_a_policy_that_exits_takes_nobody_along(where: str, tmp_path: Path) -> None:
    write_policy(tmp_path, "from qllm.scheduler import Policy\n\nclass Mine(Policy):\n" + where)
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    with pytest.raises(ConfigError, match=r"mine\.py:[45]: SystemExit: 0"):
        simulate(path, set=["policies=[{file: mine.py}]"])


@pytest.mark.parametrize("again", ["now", "now - 1", "now + 1e-12", "float('-inf')"])
def test_a_policy_that_wants_to_be_asked_at_once_lets_time_pass(again: str, tmp_path: Path) -> None:
    asks = f"    granularity = 'expert'\n\n    def recheck_at(self, s, running, now):\n        return {again}\n"
    write_policy(tmp_path, "from qllm.scheduler import Policy\n\nclass Mine(Policy):\n" + asks)
    path = write_config(tmp_path, CONFIG.replace("- fcfs", "- {file: mine.py}"))
    done = simulate(path, set=["policies=[{file: mine.py}]", "sweep.rate=[50]", "seeds=1"])
    assert (done.requests["status"] == "finished").all()
