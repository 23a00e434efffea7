"""The importer finds again what a made-up table was computed from, and says what a table does not hold."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qllm.traces.step_times.aiconfigurator import decode_points, import_aiconfigurator, prefill_points
from qllm.traces.step_times.aiconfigurator_tables import Tables, gemm_seconds
from qllm.traces.step_times.expert_fit import balanced_counts, fit_balanced
from qllm.traces.step_times.file_format import TimingError, TimingWarning
from qllm.traces.step_times.model_shapes import SHAPES, ModelShape
from qllm.traces.step_times.timings import Timings

ROOT = Path(__file__).resolve().parents[2]
A100 = ROOT.parent / "shared" / "data" / "a100"
SHAPE = ModelShape("tiny", 4, 1024, 16, 4, 64, 512, 16, 2, 8192)
SYSTEM = """
gpu:
  mem_bw: 1000000000000
  mem_bw_empirical_scaling_factor: 0.8
  mem_empirical_constant_latency: 0.000003
  mem_capacity: 1000000000
node: {pcie_bw: 32000000000}
"""


def expert_seconds(m: np.ndarray) -> np.ndarray:
    return 4e-6 + 2e-7 * np.asarray(m, dtype=float)


def gemm_ms(m: np.ndarray, n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return 1e-9 * m * n * k


def tables() -> dict[str, pd.DataFrame]:
    """Made-up tables: GEMM time is a product, attention a square, f a straight line with base 30 us."""
    sizes = [1, 2, 4, 8, 16, 64, 256, 1024]
    grid = pd.MultiIndex.from_product(
        [sizes, [16, 512, 1024, 2048, 4096, 8192], [512, 1024, 4096]], names=["m", "n", "k"]
    )
    gemm = grid.to_frame(index=False).assign(gemm_dtype="bfloat16")
    gemm["latency"] = gemm_ms(gemm["m"], gemm["n"], gemm["k"])
    head = {
        "attn_dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "head_dim": 64,
        "num_heads": 16,
        "num_key_value_heads": 4,
    }
    context = pd.DataFrame({"batch_size": 1, "isl": [64, 128, 1024], "step": 0, **head})
    context["latency"] = 1e-6 * context["isl"] ** 2
    decode = pd.MultiIndex.from_product([[1, 2, 8], [1, 127, 1023]], names=["batch_size", "step"]).to_frame(index=False)
    decode = decode.assign(isl=1, latency=1e-5 * decode["batch_size"] * (decode["step"] + 100), **head)
    tokens = [1, 2, 4, 8, 16, 64, 256, 1024]
    seconds = [30e-6 + expert_seconds(c[c > 0]).sum() for c in (balanced_counts(n, 2, 16) for n in tokens)]
    moe = pd.DataFrame({"device": "Toy GPU", "kernel_source": "toy", "moe_dtype": "bfloat16", "num_tokens": tokens})
    moe = moe.assign(hidden_size=1024, inter_size=512, topk=2, num_experts=16, moe_tp_size=1, moe_ep_size=1)
    moe = moe.assign(distribution="balanced", latency=1e3 * np.array(seconds))
    return {"gemm": gemm, "context": context, "generation": decode, "moe": moe}


def write(folder: Path, layout: str, frames: dict[str, pd.DataFrame]) -> Path:
    """The tables in the flat layout or in the package's."""
    stems = {"gemm": "gemm_perf", "context": "context_attention_perf", "generation": "generation_attention_perf"}
    for kind, frame in frames.items():
        op = "attention" if kind in ("context", "generation") else kind
        stem = stems.get(kind, "moe_perf")
        path = folder / f"{op}__sglang__1.2__{stem}.parquet"
        if layout == "nested":
            path = folder / "data" / "toy" / op / "sglang" / "1.2" / f"{stem}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(path)
    (folder / "toy.yaml").write_text(SYSTEM)
    return folder


def imported(folder: Path, **changed) -> Timings:
    options = {"shape": SHAPE, "gpu": "toy", "moe": "sglang", "dense": "sglang", "attention": "sglang:1.2"}
    return import_aiconfigurator(folder, **{**options, **changed})


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_the_fit_finds_base_and_f_again(tmp_path, layout):
    timings = imported(write(tmp_path, layout, tables()))
    assert timings.device == "Toy GPU"
    assert timings.source == "imported"
    assert timings.experts_base_s == pytest.approx(30e-6, rel=1e-6)
    assert timings.expert(np.array([1, 2, 8, 32, 100])) == pytest.approx(expert_seconds([1, 2, 8, 32, 100]), rel=1e-6)
    assert timings.attention_prefill(128, 0) == pytest.approx(1e-9 * 128**2)
    assert timings.attention_decode(8, 127) == pytest.approx(1e-8 * 8 * 227)
    assert timings.memory_bytes == 1_000_000_000
    assert timings.host_bandwidth == 32e9


def test_dense_steps_are_measured_gemms_plus_memory_traffic(tmp_path):
    timings = imported(write(tmp_path, "flat", tables()))
    width = SHAPE.qkv_width  # 1536: between 1024 and 2048 on the grid
    traffic = lambda size: 64 * size / 0.8e12 + 3e-6  # noqa: E731
    expected = 1e-12 * 64 * width * 1024 + traffic(4 * 1024 * 2) + traffic(4 * width)
    assert timings.dense_pre(64) == pytest.approx(expected, rel=1e-9)
    expected = 1e-12 * 64 * 1024 * 1024 + 1e-12 * 64 * 16 * 1024 + traffic(4 * 1024 * 2)
    assert timings.dense_post(64) == pytest.approx(expected, rel=1e-9)


def test_gemms_off_the_grid_lie_between_or_grow_in_proportion():
    gemm = tables()["gemm"]
    for n, k in ((1024, 1024), (3000, 2000), (8192 * 3, 1024)):
        assert gemm_seconds(gemm, n, k)[64] == pytest.approx(1e-12 * 64 * n * k)
    assert gemm_seconds(gemm, 2, 512)[64] == pytest.approx(1e-12 * 64 * 16 * 512)  # below the grid: its smallest


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"shape": replace(SHAPE, inter=640)},
            "moe table sglang:1.2: no rows with inter_size = 640; .* there are: 512",
        ),
        ({"shape": replace(SHAPE, experts=64)}, "no rows with num_experts = 64; .* there are: 16"),
        (
            {"shape": replace(SHAPE, head_dim=128)},
            "context table sglang:1.2: no rows with head_dim = 128; .* there are: 64",
        ),
        ({"moe_dtype": "fp8"}, "no rows with moe_dtype = fp8; .* there are: bfloat16"),
        ({"moe": "vllm"}, "no moe table of 'vllm' for toy; there are: sglang:1.2"),
        ({"dense": "sglang:9"}, "no gemm table of 'sglang:9' for toy; there are: sglang:1.2"),
        ({"gpu": "h100_sxm"}, "no tables for GPU 'h100_sxm'; GPUs here: toy"),
        ({"shape": SHAPES["deepseek-v2-lite"]}, "latent attention is not among the tables"),
    ],
)
def test_what_the_tables_do_not_hold_is_named(tmp_path, changed, message):
    folder = write(tmp_path, "nested", tables())
    with pytest.raises(TimingError, match=message):
        imported(folder, **changed)


def test_skewed_rows_are_not_taken_for_balanced_ones(tmp_path):
    frames = tables()
    skewed = frames["moe"].assign(distribution="power_law_1.2", latency=lambda rows: 3 * rows["latency"])
    frames["moe"] = pd.concat([frames["moe"], skewed])
    assert imported(write(tmp_path, "flat", frames)).experts_base_s == pytest.approx(30e-6, rel=1e-6)
    frames["moe"] = skewed
    with pytest.raises(TimingError, match=r"distribution = balanced; .* there are: power_law_1.2"):
        imported(write(tmp_path, "flat", frames))


def test_an_unreadable_or_absent_folder_is_named(tmp_path):
    with pytest.raises(TimingError, match="no tables for GPU 'toy'; GPUs here: none"):
        Tables(tmp_path, "toy")
    folder = write(tmp_path, "flat", tables())
    (folder / "moe__sglang__1.2__moe_perf.parquet").write_bytes(b"not parquet")
    with pytest.raises(TimingError, match=r"moe__sglang__1.2__moe_perf.parquet: cannot be read"):
        imported(folder)
    (folder / "toy.yaml").unlink()
    with pytest.raises(TimingError, match=r"no toy.yaml"):
        Tables(folder, "toy")


def test_a_table_without_rows_of_few_assignments_cannot_give_the_base():
    with pytest.raises(TimingError, match="the base needs 2 rows of at most 8 assignments"):
        fit_balanced(pd.Series({16: 1e-3, 32: 2e-3}), experts=8, top_k=2)


def test_a_row_far_off_the_line_does_not_move_the_base(tmp_path):
    frames = tables()
    frames["moe"].loc[0, "latency"] *= 0.2
    with pytest.warns(TimingWarning, match=r"experts: .* is 400% off the 7.68 us of 1 tokens, 50.0% in the mean"):
        timings = imported(write(tmp_path, "flat", frames))
    assert timings.experts_base_s == pytest.approx(30e-6, rel=1e-6)
    assert timings.conditions["expert_fit_dropped"] == "rows of (1,) tokens, far off the line"


def test_a_tile_makes_f_step_up_after_each_block():
    blocks = lambda m: np.ceil(m / 64)  # noqa: E731
    layer = pd.Series(
        {n: 1e-5 + (2e-5 * blocks(balanced_counts(n, 2, 8))).sum() for n in (1, 2, 4, 64, 192, 320, 1024)}
    )
    fit = fit_balanced(layer, 8, 2, tile=64)
    sizes = np.array([16, 48, 64, 65, 80, 128, 129, 200, 256])
    assert np.interp(sizes, fit.tokens, fit.seconds) == pytest.approx(2e-5 * blocks(sizes))
    assert dict(zip(fit.tokens.tolist(), fit.measured.tolist(), strict=True))[65] is False
    assert dict(zip(fit.tokens.tolist(), fit.measured.tolist(), strict=True))[80] is True


def test_without_a_version_the_newest_that_holds_the_shape_is_taken(tmp_path):
    folder = write(tmp_path, "nested", tables())
    for version, hidden in (("1.10", 1024), ("1.9", 1024), ("2.0", 4096)):
        path = folder / "data" / "toy" / "moe" / "sglang" / version / "moe_perf.parquet"
        path.parent.mkdir()
        tables()["moe"].assign(hidden_size=hidden).to_parquet(path)
    assert imported(folder).framework.startswith("MoE sglang:1.10 (toy)")
    assert imported(folder, moe="sglang:1.9").framework.startswith("MoE sglang:1.9 (toy)")
    with pytest.raises(TimingError, match=r"moe table sglang:2.0: no rows with hidden_size = 1024"):
        imported(folder, moe="sglang:2.0")


def test_a_spike_in_the_decode_table_is_dropped_and_a_corner_is_modelled():
    decode = tables()["generation"]
    decode.loc[(decode["batch_size"] == 2) & (decode["step"] == 127), "latency"] *= 20
    decode = decode[~((decode["batch_size"] == 8) & (decode["step"] == 1023))]
    points = {(p.tokens, p.context): p for p in decode_points(decode, "imported")}
    assert points[2, 127].source == "modelled"
    assert points[2, 127].seconds < points[2, 1023].seconds
    assert points[8, 1023].source == "modelled"
    assert points[8, 1023].seconds == pytest.approx(4 * points[2, 1023].seconds)
    assert points[8, 127].source == "imported"


def test_prefill_over_a_cached_prefix_is_the_difference_of_two_squares():
    causal = pd.Series({64: 64.0**2, 1024: 1024.0**2}) * 1e-9
    decode = decode_points(tables()["generation"], "imported")
    points = {(p.tokens, p.context): p for p in prefill_points(causal, decode, "imported")}
    assert points[1024, 0].source == "imported"
    assert points[1024, 512].source == "modelled"
    assert points[1024, 512].seconds == pytest.approx(1e-9 * (1536**2 - 512**2))


@pytest.mark.skipif(not A100.is_dir(), reason="the measured tables are not here")
def test_the_shipped_files_are_what_the_tables_give():
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    from derive_timings import derive

    for timings in derive(A100):
        shipped = Timings.load(timings.name)
        assert replace(timings, points=shipped.points) == shipped
        again = {point[:3]: point.seconds for point in timings.points}
        assert {p[:3]: p.seconds for p in shipped.points} == pytest.approx(again, rel=1e-5)


@pytest.mark.skipif(not A100.is_dir(), reason="the measured tables are not here")
@pytest.mark.parametrize(
    ("name", "framework", "dtype", "f"),
    [
        ("mixtral-8x7b", "trtllm", "float16", {1: 205e-6, 64: 231e-6, 256: 494e-6, 1024: 1881e-6}),
        ("qwen3-30b-a3b", "trtllm", "float16", {1: 5.4e-6, 64: 7.2e-6, 1024: 67e-6}),
    ],
)
def test_f_on_the_a100_is_the_known_one(name, framework, dtype, f):
    large = (
        pytest.warns(TimingWarning, match="weights of 93.4 GB do not fit in 85.9 GB")
        if "8x7b" in name
        else nullcontext()
    )
    with large:
        timings = import_aiconfigurator(A100, shape=SHAPES[name], moe=framework, moe_dtype=dtype)
    for tokens, seconds in f.items():
        assert timings.expert(tokens) == pytest.approx(seconds, rel=0.03)
    assert 25e-6 < timings.experts_base_s < 45e-6
