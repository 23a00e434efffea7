"""What a GPU cannot do is told, in a line, wherever a timing trace comes in; what it can do is loaded in silence."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from qllm.traces import SHAPES, Timings, bundled_timings
from qllm.traces.step_times.data_sheet import GPUS, Gpu, gpu_named
from qllm.traces.step_times.file_format import Point, TimingWarning
from qllm.traces.step_times.roofline import least_of, least_seconds, times_least
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import qllm, write_config

QWEN = "a100-qwen3-30b-a3b-bf16"


def scaled(timings: Timings, factor: float, *steps: str, **header) -> Timings:
    """The trace with the seconds of `steps` (default: all) multiplied."""
    points = [p._replace(seconds=p.seconds * factor) if not steps or p.step in steps else p for p in timings.points]
    return replace(timings, points=tuple(points), **header)


def told(timings: Timings, folder: Path) -> list[str]:
    """What loading its file warns of."""
    timings.save(folder / "t.csv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Timings.load(folder / "t.csv")
    assert all(warning.category is TimingWarning for warning in caught)
    return [str(warning.message) for warning in caught]


TOO_LARGE = {name for name in bundled_timings() if "deepseek-v3" in name}  # fits in no GPU


@pytest.mark.parametrize("name", sorted({*bundled_timings()} - TOO_LARGE))
def test_shipped_traces_load_in_silence_and_are_not_below_the_roofline(name, tmp_path):
    timings = Timings.load(name)
    assert timings.implausible() == []
    assert all(0.999 < low < 20 for low, _ in times_least(timings, timings.points).values())
    assert told(replace(timings, least_s={}), tmp_path) == []


@pytest.mark.parametrize("name", sorted(TOO_LARGE))
def test_what_no_gpu_holds_says_so_when_it_is_loaded_and_in_its_provenance(name):
    with pytest.warns(TimingWarning, match=r"weights of [0-9.]+ GB do not fit in"):
        timings = Timings.load(name)
    assert "do not fit in one such GPU" in timings.provenance
    assert all(0.999 < low < 20 for low, _ in times_least(timings, timings.points).values())


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "some CPU, 2 threads"])
def test_a_plain_trace_that_states_no_roofline_loads_in_silence(device, tmp_path):
    timings = replace(affine_timings(), source="measured", device=device)
    assert told(timings, tmp_path) == []


@pytest.mark.parametrize("step", ["dense_pre", "attention_prefill", "attention_decode", "dense_post", "expert", "head"])
def test_milliseconds_in_the_seconds_column_are_told(step, tmp_path):
    lines = told(scaled(Timings.load(QWEN), 1000, step), tmp_path)
    assert len(lines) == 1
    assert f"{step}: every row takes at least" in lines[0]
    assert "is it in milliseconds?" in lines[0]


@pytest.mark.parametrize("step", ["dense_pre", "attention_prefill", "attention_decode", "dense_post", "expert", "head"])
def test_a_step_faster_than_the_gpu_is_told(step, tmp_path):
    lines = told(scaled(Timings.load(QWEN), 0.1, step), tmp_path)
    assert len(lines) == 1
    assert f"'{QWEN}': {step} " in lines[0]
    assert "which NVIDIA A100-SXM4-80GB cannot do in less than" in lines[0]


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1000, "times what is needed; is it in milliseconds"), (0.02, "cannot read half of the weights")],
)
def test_a_trace_without_a_roofline_is_held_against_its_weights(factor, message, tmp_path):
    (line,) = told(scaled(Timings.load(QWEN), factor, least_s={}), tmp_path)
    assert message in line


def test_milliseconds_of_an_unknown_machine_are_told(tmp_path):
    """A CPU of 100 GFLOP/s with the weights of Qwen3-30B-A3B."""
    timings = scaled(Timings.load(QWEN), 1000, least_s={}, source="measured", device="some CPU")
    assert told(timings, tmp_path) == []
    (line,) = told(scaled(timings, 1000), tmp_path)
    assert "is it in milliseconds?" in line


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"launch_s": 5.0}, "launch_s is 5 seconds: is it in another unit?"),
        ({"experts_base_s": 45.0}, "experts_base_s is 45 seconds"),
        ({"host_bandwidth": 32.0}, "host_bandwidth is 32 bytes per second"),
        ({"memory_bytes": 80}, "weights of 61.1 GB do not fit in 0.0 GB of memory"),
        ({"conditions": {"implausible": ["what the import told"]}}, "what the import told"),
    ],
)
def test_a_header_in_other_units_is_told(header, message, tmp_path):
    (line,) = told(replace(Timings.load(QWEN), **header), tmp_path)
    assert message in line


def test_the_roofline_is_that_of_the_data_sheet():
    shape = SHAPES["qwen3-30b-a3b"]
    least = least_seconds(shape, GPUS["A100"], ("bf16", 312e12), ("bf16", 312e12))
    point = Point("expert", 1, None, 0.0)
    assert least_of(least, point) == pytest.approx(2 * 3 * 2048 * 768 / 2.039e12, rel=1e-3)
    assert least_of(least, point._replace(tokens=1024)) == pytest.approx(2 * 3 * 2048 * 768 * 1024 / 312e12, rel=1e-3)
    decode = Point("attention_decode", 32, 1000, 0.0)
    assert least_of(least, decode) == pytest.approx(32 * 1000 * 2 * 4 * 128 * 2 / 2.039e12, rel=1e-3)
    prefill = Point("attention_prefill", 1000, 500, 0.0)
    assert least_of(least, prefill) == pytest.approx(4 * 32 * 128 * 1000 * (500 + 500) / 312e12, rel=1e-3)
    assert least_of({}, prefill) == 0
    windows = least_seconds(replace(shape, window=128, window_layers=24), GPUS["A100"], ("bf16", 1e15), ("bf16", 1e15))
    assert windows["attention_decode"][1] == pytest.approx(least["attention_decode"][1] / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA L40S", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", "A10"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD EPYC 7763, 2 threads", None),
        ("none", None),
    ],
)
def test_a_gpu_is_found_by_its_name(device, key):
    assert gpu_named(device) == (GPUS[key] if key else None)
    assert Gpu(1.0, 2.0).bandwidth == 1


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_sweep_says_once_what_is_not_plausible(tmp_path, jobs):
    config = write_config(tmp_path)
    replace(Timings.load(tmp_path / "timings.csv"), memory_bytes=1 << 29).save(tmp_path / "timings.csv")
    done = qllm(
        "simulate", str(config), "--set", "limits.kv_blocks=9999", "--out", str(tmp_path / "out"), "--jobs", jobs
    )
    assert done.returncode == 0
    assert done.stderr.count("weights of 1.1 GB do not fit in 0.5 GB of memory") == 1


def test_describe_shows_the_roofline_and_what_is_not_plausible(tmp_path):
    scaled(Timings.load(QWEN), 1000, "head").save(tmp_path / "slow.csv")
    shown = qllm("timings", "describe", str(tmp_path / "slow.csv"))
    assert shown.returncode == 0
    assert "1.54 to 3.85" in shown.stdout
    assert "implausible: head: every row takes at least 1352 times what NVIDIA A100-SXM4-80GB needs" in shown.stdout
    assert shown.stderr == ""
    assert "implausible" not in qllm("timings", "describe", QWEN).stdout
    described = json.loads(qllm("timings", "describe", "--json", QWEN).stdout)
    assert described["implausible"] == []
    assert described["steps"]["dense_pre"]["times_least"] == pytest.approx([1.54, 3.85], rel=0.01)
