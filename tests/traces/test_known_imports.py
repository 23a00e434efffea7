"""Imports by name alone: what ships is what the package gives, and what there is none of is a line."""

import importlib.util
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qllm.traces import SHAPES, TimingError, Timings, bundled_timings
from qllm.traces.step_times.aiconfigurator import known
from qllm.traces.step_times.data_sheet import DATA_SHEETS
from tests.traces.test_aiconfigurator import SHAPE, imported, tables, write

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
needs_tables = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None, reason="the package of tables is not installed"
)
FEW = [("h200", "deepseek-v3", "fp8"), ("l40s", "gpt-oss-20b", "mxfp4")]


def box() -> list[tuple[str, str, str]]:
    from derive_timings import BOX

    return BOX


@needs_tables
@pytest.mark.filterwarnings("ignore::qllm.traces.step_times.file_format.TimingWarning")
@pytest.mark.parametrize(
    ("gpu", "model", "dtype"),
    [pytest.param(*one, marks=() if one in FEW else pytest.mark.slow, id="-".join(one)) for one in box()],
)
def test_a_shipped_file_is_what_the_package_gives(gpu, model, dtype):
    timings = known.import_known(gpu, SHAPES[model], dtype)
    shipped = Timings.load(timings.name)
    assert replace(timings, points=shipped.points) == shipped
    again = {point[:3]: point.seconds for point in timings.points}
    assert {p[:3]: p.seconds for p in shipped.points} == pytest.approx(again, rel=1e-5)
    assert {p[:3]: p.source for p in shipped.points} == {p[:3]: p.source for p in timings.points}


def test_every_file_of_the_box_ships_and_the_box_stays_small():
    names = {known.trace_name(gpu, SHAPES[model], dtype) for gpu, model, dtype in box()}
    assert names < set(bundled_timings())
    folder = Path(known.__file__).parents[2] / "data" / "timings"
    assert sum(path.stat().st_size for path in folder.glob("*.csv")) < 700_000


@pytest.mark.filterwarnings("ignore::qllm.traces.step_times.file_format.TimingWarning")
@pytest.mark.parametrize("name", bundled_timings())
def test_every_shipped_trace_is_of_its_name_and_licensed(name):
    timings = Timings.load(name)
    gpu = DATA_SHEETS[known.data_sheet_name(name.split("-")[0])]
    assert (timings.name, timings.device, timings.memory_bytes) == (name, gpu.device, gpu.memory)
    assert timings.model in name
    shape = SHAPES[timings.model]
    assert timings.kv_bytes_per_token == shape.kv_bytes_per_token()
    assert timings.sequence_bytes == shape.sequence_bytes()
    assert timings.licence.startswith("Apache-2.0 (NVIDIA aiconfigurator")
    assert "aiconfigurator's tables" in timings.provenance
    assert ("do not fit" in timings.provenance) == (timings.weights_bytes > timings.memory_bytes)


@pytest.mark.parametrize(
    ("gpu", "model", "kinds"),
    [
        ("h200", "qwen3-30b-a3b", ["bf16", "fp8", "mxfp4", "nvfp4", "int4"]),
        ("h100", "mixtral-8x7b", ["fp8", "mxfp4", "nvfp4", "int4"]),
        ("h100", "gpt-oss-120b", ["mxfp4", "nvfp4", "int4"]),
        ("h200", "deepseek-v3", []),
    ],
)
def test_types_that_leave_room_for_kv(gpu, model, kinds):
    assert known.dtypes_that_fit(gpu, SHAPES[model]) == kinds


def test_an_unknown_type_is_a_line():
    with pytest.raises(TimingError, match="unknown dtype 'bf17'; did you mean 'bf16'"):
        known.import_known("h200", SHAPES["qwen3-30b-a3b"], "bf17")


def add_framework(folder: Path, name: str, factors: dict[str, float]) -> None:
    """The tables again by another framework, each kind so many times as slow."""
    ops = {"gemm": "gemm", "context": "attention", "generation": "attention", "moe": "moe"}
    stems = {"gemm": "gemm_perf", "moe": "moe_perf"}
    for kind, factor in factors.items():
        frame = tables()[kind]
        stem = stems.get(kind, f"{kind}_attention_perf")
        frame.assign(latency=factor * frame["latency"]).to_parquet(folder / f"{ops[kind]}__{name}__9__{stem}.parquet")


def test_the_fastest_framework_is_taken_of_each_kind_of_table(tmp_path):
    folder = write(tmp_path, "flat", tables())
    add_framework(folder, "other", {"gemm": 0.5, "context": 2.0, "generation": 2.0, "moe": 0.9})
    best = imported(folder, moe="fastest", dense="fastest", attention="fastest")
    assert best.framework == "MoE other:9 (toy), GEMM other:9, attention sglang:1.2"
    alone = imported(folder, moe="other", dense="other", attention="sglang")
    assert best.points == alone.points
    with pytest.raises(TimingError, match="no rows with num_experts = 64"):
        imported(folder, moe="fastest", shape=replace(SHAPE, experts=64))


def test_a_framework_whose_experts_do_not_add_up_is_passed_over(tmp_path):
    """One row five times as fast as the line of the others: it is the fastest, and no fit describes it."""
    folder = write(tmp_path, "flat", tables())
    odd = tables()["moe"].assign(latency=lambda t: 0.9 * t["latency"])
    odd.loc[0, "latency"] *= 0.2
    odd.to_parquet(folder / "moe__odd__9__moe_perf.parquet")
    assert imported(folder, moe="fastest").framework.startswith("MoE sglang:1.2")


def latent_tables() -> dict[str, pd.DataFrame]:
    """Attention of 16 heads: prefill a square, decode in proportion, the products a line."""
    head = {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 16}
    context = pd.DataFrame({"batch_size": 1, "isl": [64, 128, 1024], "step": 0, **head})
    context["latency"] = 1e-6 * context["isl"] ** 2
    decode = pd.MultiIndex.from_product([[1, 2, 8], [1, 127, 1023]], names=["batch_size", "step"]).to_frame(index=False)
    decode = decode.assign(latency=1e-5 * decode["batch_size"] * (decode["step"] + 100), **head)
    # Heads that many GPUs share out are measured more than once.
    decode = pd.concat([decode.assign(tp_size=1), decode.assign(tp_size=8)])
    tokens = np.array([1, 2, 8])
    products = pd.concat(
        pd.DataFrame({"op_name": f"mla_gen_{step}", "num_tokens": tokens, "latency": each * (10 + tokens)})
        for step, each in (("pre", 1e-3), ("post", 2e-3))
    ).assign(bmm_dtype="bfloat16", num_heads=16)
    return {"context_mla": context, "generation_mla": decode, "mla_bmm": products}


def test_latent_attention_is_its_kernels_and_the_products_around_them(tmp_path):
    folder = write(tmp_path, "flat", tables())
    for kind, frame in latent_tables().items():
        op = "mla_bmm" if kind == "mla_bmm" else "mla"
        frame.to_parquet(folder / f"{op}__sglang__1.2__{kind}_perf.parquet")
    shape = replace(SHAPE, latent_kv=512 + 32, latent_rope=32, latent_q=512)
    timings = imported(folder, shape=shape)
    assert timings.attention_decode(8, 127) == pytest.approx(1e-8 * 8 * 227 + 3e-6 * 18)
    n, k = shape.latent_gemm
    assert (n, k) == (16 * 128, 512)
    assert timings.attention_prefill(128, 0) == pytest.approx(1e-9 * 128**2 + 1e-12 * 128 * n * k, rel=1e-3)
    # over 512 cached tokens: K and V of all 1,536 are made, beyond the table's 1,024 in proportion
    expected = 1e-9 * (1536**2 - 512**2) + 1e-12 * 1536 * n * k
    assert timings.attention_prefill(1024, 512) == pytest.approx(expected, rel=1e-3)
    assert timings.kv_bytes_per_token == shape.layers * 544 * 2
    assert "544 values kept per token and layer" in timings.modelled["latent attention"]
    gemms = 1e-12 * 64 * ((512 + 544) * 1024 + 16 * 96 * 512)
    traffic = 64 * (4 * 1024 * 2 + 2 * 2 * shape.qkv_width) / 0.8e12 + 6e-6
    assert timings.dense_pre(64) == pytest.approx(gemms + traffic, rel=0.02)  # 1,056 columns lie off the grid
    with pytest.raises(TimingError, match=r"context_mla table sglang:1.2: no rows with num_heads = 32"):
        imported(folder, shape=replace(shape, heads=32, kv_heads=4))


def test_layers_without_experts_are_told(tmp_path):
    folder = write(tmp_path, "flat", tables())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timings = imported(folder, shape=replace(SHAPE, dense_layers=1, dense_inter=64))
    assert timings.modelled["dense layers"].startswith("1 of 4 layers have no experts in the model")
