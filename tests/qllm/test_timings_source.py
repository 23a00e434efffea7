"""What `timings` may say: a file, what ships, a GPU and a model; each row of a sweep says where its times are from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qllm import simulate
from qllm.config import timings_source
from qllm.config.config import load_config
from qllm.config.yaml_lines import ConfigError
from qllm.traces import ModelShape, TimingError, Timings
from qllm.traces.step_times.aiconfigurator import known
from qllm.traces.step_times.testing import affine_timings
from tests.cli_support import write_config
from tests.traces.test_hf_config import MIXTRAL


def test_every_row_says_its_own_source(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for source in ("measured", "imported"):
        timings = affine_timings(layers=4, experts=8, top_k=2, hidden=64)
        replace(timings, source=source).save(tmp_path / f"{source}.csv")
    files = [str(tmp_path / f"{name}.csv") for name in ("timings", "measured", "imported")]
    results = simulate(
        config, set=[f"sweep.timings=[{','.join(files)}]", "sweep.rate=[5]", "seeds=1", "policies=[fcfs]"]
    )
    for table in (results.requests, results.summary):
        told = {Path(file).stem: source for file, source in zip(table["timings"], table["timings_source"], strict=True)}
        assert told == {"timings": "modelled", "measured": "measured", "imported": "imported"}
    assert len(results.summary) == 6


@pytest.mark.parametrize("table", ["requests", "summary"])
def test_without_such_a_sweep_there_is_no_such_column(tmp_path: Path, table: str) -> None:
    results = simulate(write_config(tmp_path), set=["sweep.rate=[5]", "seeds=1"])
    assert "timings_source" not in getattr(results, table)


def timings_of(folder: Path, written: str) -> str:
    """What a configuration with `timings: WRITTEN` resolves to."""
    return load_config(write_config(folder), [f"timings={written}"]).timings


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("{gpu: h200, model: qwen3-30b-a3b}", "h200-qwen3-30b-a3b-bf16"),
        ("{gpu: H200_SXM, model: Qwen/Qwen3-30B-A3B, dtype: fp8}", "h200-qwen3-30b-a3b-fp8"),
        ("{gpu: h100, model: mixtral-8x7b}", "h100-mixtral-8x7b-fp8"),  # in bf16 it does not fit
        ("{gpu: a100, model: mixtral-8x7b}", "a100-mixtral-8x7b-int4"),
        ("{gpu: a100, model: mixtral-8x7b, dtype: 4bit-hf}", "a100-mixtral-8x7b-4bit-hf"),
        ("{gpu: l40s, model: gpt-oss-20b}", "l40s-gpt-oss-20b-mxfp4"),
        ("{gpu: b200, model: qwen3-235b-a22b}", "b200-qwen3-235b-a22b-nvfp4"),
        ("{gpu: b200, model: deepseek-v3, dtype: nvfp4}", "b200-deepseek-v3-nvfp4"),
    ],
)
def test_a_gpu_and_a_model_name_what_ships(tmp_path: Path, written: str, name: str) -> None:
    assert timings_of(tmp_path, written) == name


def test_a_config_json_names_a_model(tmp_path: Path) -> None:
    (tmp_path / "mixtral.json").write_text(json.dumps(MIXTRAL))
    assert timings_of(tmp_path, "{gpu: h200, model: mixtral.json}") == "h200-mixtral-8x7b-bf16"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{gpu: h300, model: qwen3-30b-a3b}", "timings: unknown GPU 'h300'; .*allowed: a100_sxm, "),
        ("{gpu: h200, model: qwen}", "timings: unknown model 'qwen'; allowed: mixtral-8x7b, "),
        ("{gpu: h200}", "timings: model: this key is missing"),
        ("{gpuu: h200, model: qwen3-30b-a3b}", "unknown key 'gpuu'; did you mean 'gpu'. allowed: gpu, model, dtype"),
        ("{gpu: 7, model: qwen3-30b-a3b}", "timings: gpu: must be text, got 7"),
        ("{gpu: h200, model: nowhere.json}", "timings: no such file: "),
        ("{gpu: h200, model: deepseek-v3}", "deepseek-v3 does not fit in one h200 of 151 GB .*671 GB in fp8"),
        ("[h200]", "timings: must be text, got a list"),
    ],
)
def test_names_that_mean_nothing_are_a_line_that_lists_what_there_is(
    tmp_path: Path, written: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        timings_of(tmp_path, written)
    assert "\n" not in str(caught.value)


def test_without_the_tables_a_line_says_what_ships_and_how_to_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "tables_version", lambda: None)
    there = r"there are: b200-qwen3-235b-a22b-nvfp4; or model one: qllm timings roofline --gpu b300_sxm --model qwen3"
    with pytest.raises(ConfigError, match=f"of b300 qwen3-235b-a22b ships, and aiconf.* is not installed; {there}"):
        timings_of(tmp_path, "{gpu: b300, model: qwen3-235b-a22b}")


def test_what_does_not_ship_is_imported_once_into_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def import_known(gpu: str, shape: ModelShape, dtype: str) -> Timings:
        asked.append(dtype)
        if dtype != "fp8":
            raise TimingError(f"no rows in {dtype}")
        return replace(affine_timings(), name=known.trace_name(gpu, shape, dtype))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "tables_version", lambda: "9.9")
    monkeypatch.setattr(known, "import_known", import_known)
    timings_source._imported.cache_clear()
    try:
        path = Path(timings_of(tmp_path, "{gpu: h200, model: olmoe-1b-7b}"))
        assert path == tmp_path / "cache/qllm/timings/aiconfigurator-core-9.9/h200-olmoe-1b-7b-fp8.csv"
        assert len(Timings.load(path).points) == len(affine_timings().points)
        assert asked[:2] == ["bf16", "fp8"]
        assert asked.count("fp8") == 1
        before = path.stat()
        timings_source._imported.cache_clear()
        assert timings_of(tmp_path, "{gpu: h200, model: olmoe-1b-7b}") == str(path)
        assert path.stat().st_mtime_ns == before.st_mtime_ns  # results of an earlier run stay valid
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        with pytest.raises(ConfigError, match=r"nor can one be imported \(no rows in int4\); there are: "):
            timings_of(tmp_path, "{gpu: l40s, model: olmoe-1b-7b, dtype: int4}")
        timings_source._imported.cache_clear()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(ConfigError, match="the imported trace cannot be written: Not a directory"):
            timings_of(tmp_path, "{gpu: h200, model: olmoe-1b-7b}")
    finally:
        timings_source._imported.cache_clear()


def test_a_sweep_over_gpus_names_each(tmp_path: Path) -> None:
    gpus = ", ".join(f"{{gpu: {gpu}, model: qwen3-30b-a3b}}" for gpu in ("a100", "h100", "h200", "b200"))
    config = load_config(write_config(tmp_path), [f"sweep.timings=[{gpus}]", "sweep.rate=[5]"])
    names = [f"{gpu}-qwen3-30b-a3b-bf16" for gpu in ("a100", "h100", "h200", "b200")]
    assert [cell["timings"] for cell in config.point_cells()] == names
    assert config.at(config.points()[1]).timings == names[1]
    with pytest.raises(ConfigError, match=r"timings.gpu cannot be swept; allowed: timings: \[\{gpu: "):
        load_config(write_config(tmp_path), ["sweep={timings.gpu: [h100, h200]}"])
