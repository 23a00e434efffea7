"""`qllm timings list` and `qllm timings roofline`: what ships, and what a data sheet gives."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qllm.cli import app
from qllm.traces import Timings, bundled_timings
from qllm.traces.step_times.data_sheet import DATA_SHEETS
from qllm.traces.step_times.model_shapes import SHAPES
from qllm.traces.step_times.modelled import Costs, roofline_timings
from tests.cli_support import qllm
from tests.traces.test_hf_config import GPT_OSS, QWEN

MIXTRAL_ON_H100 = ("--gpu", "h100", "--model", "mixtral-8x7b")


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["timings", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_list_shows_each_trace_that_ships_with_its_distance_from_the_roofline() -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json"))}
    assert list(rows) == bundled_timings()
    assert {row["source"] for row in rows.values()} == {"imported", "modelled"}
    for name, row in rows.items():
        assert row["fits"] == ("deepseek-v3" not in name)
        assert row["decode_over_roofline"] > 1
        assert row["prefill_over_roofline"] > 1
        assert row["source"] == "modelled" or row["decode_over_roofline"] < 5
    shown = run("list", "--gpu", "h200", "--model", "deepseek")
    (line,) = [line for line in shown.splitlines() if line.startswith("h200-")]
    assert "imported" in line
    assert line.endswith("does NOT fit in one")


def test_a_trace_that_states_no_roofline_has_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    from qllm.cli import timings_list
    from qllm.traces.step_times.testing import affine_timings

    monkeypatch.setattr(timings_list.Timings, "load", lambda _: affine_timings())
    assert {row["decode_over_roofline"] for row in timings_list.rows()} == {None}
    assert " - " in run("list")


def test_roofline_writes_what_the_function_gives(tmp_path: Path) -> None:
    out = tmp_path / "new" / "t.csv"
    told = run("roofline", "--gpu", "A100_SXM", "--model", "qwen3-30b-a3b", "--out", str(out))
    assert told == f"{out}: modelled; NVIDIA A100-SXM4-80GB; qwen3-30b-a3b; experts bf16, the rest bf16; 522 points\n"
    expected = roofline_timings(SHAPES["qwen3-30b-a3b"], DATA_SHEETS["a100_sxm"], name="t")
    assert Timings.load(out) == Timings.load(_saved(expected, tmp_path / "e.csv"))


def _saved(timings: Timings, path: Path) -> Path:
    timings.save(path)
    return path


def test_roofline_reads_a_config_json_and_its_quantisation(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    for given in (["--hf-config", str(tmp_path)], ["--model", str(tmp_path / "config.json")]):
        assert "gpt-oss-20b; experts mxfp4, the rest bf16" in run(
            "roofline", "--gpu", "l40s", *given, "--out", str(tmp_path / "t.csv")
        )
    sizes = "layers: 2, hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, inter: 32, experts: 4, top_k: 2, vocab: 99"
    yaml = f"{{name: mini, {sizes}}}"
    assert "; mini; experts fp8, the rest fp8" in run(
        *("roofline", "--gpu", "h100", "--model", yaml, "--dtype", "fp8", "--out", str(tmp_path / "t.csv"))
    )


def test_every_parameter_counts(tmp_path: Path) -> None:
    def total(*flags: str) -> tuple[float, ...]:
        run(
            "roofline",
            "--gpu",
            "h100",
            "--model",
            "mixtral-8x7b",
            "--dtype",
            "int4",
            *flags,
            "--out",
            str(tmp_path / "t.csv"),
        )
        timings = Timings.load(tmp_path / "t.csv")
        header = timings.experts_base_s, timings.launch_s, timings.host_s, timings.memory_bytes
        return (sum(point.seconds for point in timings.points), *header)

    plain = total()
    for key, value in vars(Costs()).items():
        assert total(f"--{key.replace('_', '-')}", str(value * 0.9)) != plain, key
    total("--flops", "1e14")
    assert Timings.load(tmp_path / "t.csv").device == "NVIDIA H100 80GB HBM3 with flops 1e+14"  # no longer that GPU
    for flag, value in (("bandwidth", "1e12"), ("flops", "1e14"), ("memory", "70000000000")):
        assert total(f"--{flag}", value) != plain, flag


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h300", "--model", "mixtral-8x7b"], "unknown GPU 'h300'; did you mean 'gb300'? allowed: a100_sxm"),
        (["--gpu", "h100"], "give --model or --hf-config, one of them"),
        ([*MIXTRAL_ON_H100, "--hf-config", "x"], "give --model or --hf-config, one of them"),
        (["--gpu", "h100", "--model", "mixtral"], "--model mixtral: unknown; did you mean 'mixtral-8x7b'?"),
        (
            ["--gpu", "h100", "--hf-config", "nowhere.json"],
            "nowhere.json: no such file; allowed: a Hugging Face",
        ),
        ([*MIXTRAL_ON_H100, "--dtype", "fp7"], "dtype: unknown type of weights 'fp7'"),
        (
            [*MIXTRAL_ON_H100, "--gemm-efficiency", "2"],
            "gemm_efficiency is 2.0, must be above 0",
        ),
        (
            [*MIXTRAL_ON_H100, "--bandwidth", "-1"],
            "bandwidth of the GPU is -1.0, must be above 0",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    done = qllm("timings", "roofline", *words, "--out", str(tmp_path / "t.csv"))
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("changed", [{"hidden_size": -1}, {"num_experts": None, "model_type": "llama"}])
def test_a_bad_config_json_is_one_line_with_file_and_key(tmp_path: Path, changed: dict) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**QWEN, **changed}))
    done = qllm("timings", "roofline", "--gpu", "h100", "--hf-config", str(path), "--out", str(tmp_path / "t.csv"))
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert str(path) in line
    assert f"key '{next(iter(changed))}'" in line
    assert "allowed: " in line


def test_list_of_nothing_says_what_there_is() -> None:
    done = qllm("timings", "list", "--gpu", "tpu")
    assert done.returncode != 0
    assert "--gpu tpu: no timing trace ships; allowed: parts of a100-mixtral-8x7b-4bit-hf, " in done.stderr
