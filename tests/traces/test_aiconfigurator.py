"""The importer finds again what a made-up table was computed from, and says what a table does not hold."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qllm.traces.step_times.aiconfigurator.importer import import_aiconfigurator
from qllm.traces.step_times.aiconfigurator.points import decode_points, prefill_points
from qllm.traces.step_times.aiconfigurator.tables import Tables, gemm_seconds
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
        (
            {"shape": replace(SHAPE, latent_kv=96, latent_rope=32)},
            "no context_mla table of 'sglang:1.2' for toy; there are: none",
        ),
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


def test_a_spike_of_the_shortest_context_takes_the_next_ones_time():
    decode = tables()["generation"]
    decode.loc[(decode["batch_size"] == 1) & (decode["step"] == 1), "latency"] *= 100
    points = {(p.tokens, p.context): p for p in decode_points(decode, "imported")}
    assert points[1, 1].source == "modelled"
    assert points[1, 1].seconds == pytest.approx(points[1, 127].seconds)


def test_prefill_over_a_cached_prefix_is_the_difference_of_two_squares():
    causal = pd.Series({64: 64.0**2, 1024: 1024.0**2}) * 1e-9
    decode = decode_points(tables()["generation"], "imported")
    points = {(p.tokens, p.context): p for p in prefill_points(causal, decode, "imported")}
    assert points[1024, 0].source == "imported"
    assert points[1024, 512].source == "modelled"
    assert points[1024, 512].seconds == pytest.approx(1e-9 * (1536**2 - 512**2))


def two_kernels(frames: dict[str, pd.DataFrame], kind: str, factor: float, rows: slice = slice(None)) -> None:
    """Let `kind` also hold rows of a kernel "other" that takes `factor` times as long."""
    frame = frames[kind].assign(kernel_source="toy")
    other = frame.assign(kernel_source="other", latency=factor * frame["latency"])
    frames[kind] = pd.concat([frame, other.iloc[rows]], ignore_index=True)


@pytest.mark.parametrize("kind", ["moe", "gemm", "context", "generation"])
@pytest.mark.parametrize(("factor", "best"), [(0.8, "other"), (3.0, "toy")])
def test_two_kernels_are_told_apart_and_the_fastest_is_taken(tmp_path, kind, factor, best):
    frames = tables()
    plain = imported(write(tmp_path / "plain", "flat", frames))
    two_kernels(frames, kind, factor)
    timings = imported(write(tmp_path / "both", "flat", frames))
    assert timings.points == plain.points or best == "other"
    if kind == "moe":
        assert timings.experts_base_s == pytest.approx(30e-6 * min(factor, 1), rel=1e-5)
    if kind != "context":
        other = "other" if best == "toy" else "toy"
        assert f"sglang:1.2:{best}" in timings.framework
        assert timings.conditions["of several kernels"] == f"sglang:1.2:{best}, not {other}"


def test_a_kernel_measured_at_more_sizes_goes_before_a_faster_one(tmp_path):
    frames = tables()
    two_kernels(frames, "moe", 0.5, slice(0, 4))
    timings = imported(write(tmp_path, "flat", frames))
    assert timings.experts_base_s == pytest.approx(30e-6, rel=1e-5)
    assert "MoE sglang:1.2:toy (toy)" in timings.framework


def test_kernels_that_share_the_sizes_out_are_one_curve(tmp_path):
    frames = tables()
    plain = imported(write(tmp_path / "plain", "flat", frames))
    small = frames["gemm"]["m"] < 64
    frames["gemm"] = frames["gemm"].assign(kernel_source=np.where(small, "small", "large"))
    shared = imported(write(tmp_path / "shared", "flat", frames))
    assert shared.points == plain.points
    assert "of several kernels" not in shared.conditions


def test_a_kernel_is_chosen_by_name(tmp_path):
    frames = tables()
    two_kernels(frames, "moe", 0.5)
    folder = write(tmp_path, "flat", frames)
    assert imported(folder, moe="sglang:1.2:toy").experts_base_s == pytest.approx(30e-6, rel=1e-5)
    with pytest.raises(TimingError, match=r"no rows with kernel_source = third; .* there are: other, toy"):
        imported(folder, moe="sglang:1.2:third")


def test_skewed_rows_are_told_by_the_columns_older_name(tmp_path):
    frames = tables()
    skewed = frames["moe"].assign(distribution="power_law_1.2", latency=lambda rows: 3 * rows["latency"])
    both = pd.concat([skewed, frames["moe"]])
    frames["moe"] = both.rename(columns={"distribution": "workload_distribution"})
    assert imported(write(tmp_path, "flat", frames)).experts_base_s == pytest.approx(30e-6, rel=1e-6)
    frames["moe"] = both.drop(columns="distribution")
    with pytest.raises(TimingError, match="column 'distribution' is missing, so rows with distribution = balanced"):
        imported(write(tmp_path, "flat", frames))


def test_what_stands_twice_is_named(tmp_path):
    frames = tables()
    frames["moe"]["workload_distribution"] = "power_law_1.2"
    with pytest.raises(TimingError, match=r"moe table sglang:1.2: column 'distribution' stands twice"):
        imported(write(tmp_path, "flat", frames))
    frames["gemm"].to_parquet(tmp_path / "gemm__sglang__1.2__gemm_perf_again.parquet")
    with pytest.raises(
        TimingError, match=r"gemm_perf_again.parquet: a second gemm table of sglang:1.2, beside .*gemm_p"
    ):
        imported(tmp_path)


@pytest.mark.parametrize("kind", ["moe", "gemm", "context", "generation"])
@pytest.mark.parametrize("latency", [np.nan, 0.0, -1.0, np.inf])
def test_a_row_without_a_latency_is_named(tmp_path, kind, latency):
    frames = tables()
    frames[kind].loc[1, "latency"] = latency
    with pytest.raises(TimingError, match=rf"{kind} table sglang:1.2: 1 of \d+ rows have no latency above 0, first"):
        imported(write(tmp_path, "flat", frames))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("generation", lambda t: t[t["step"] == 127], "decode attention needs 2 contexts .* the table has 127"),
        ("generation", lambda t: t[t["batch_size"] > 1], "2 contexts of a batch of 1, the tables have 3 and 0"),
        (
            "generation",
            lambda t: t[(t["batch_size"] > 1) | (t["step"] < 1023)],
            r"smallest batch, 1, .* \(step\) of 1023",
        ),
        ("generation", lambda t: t[t["batch_size"] > 512], "no rows with|needs 2 contexts"),
        ("generation", lambda t: t.drop(columns="step"), "generation table sglang:1.2: column 'step' is missing"),
        ("context", lambda t: t[t["isl"] == 64], "attention needs 2 lengths of prompts"),
        ("moe", lambda t: t[t["num_tokens"] > 8], "the base needs 2 rows"),
        ("moe", lambda t: t[t["num_tokens"] < 16], "f needs a row of more than 16 assignments"),
        ("moe", lambda t: t.drop(columns="device"), "moe table sglang:1.2: column 'device' is missing"),
        ("moe", lambda t: t.drop(columns="latency"), "moe table sglang:1.2: column 'latency' is missing"),
        ("moe", lambda t: t.rename(columns={"num_tokens": "tokens"}), "column 'num_tokens' is missing"),
        ("moe", lambda t: t.assign(latency="fast"), "rows have no latency above 0, first that of num_tokens = 1: fast"),
        (
            "moe",
            lambda t: pd.concat([t, t.assign(layout="b")]).fillna("a"),
            r"rows of the same sizes differ in layout \(a",
        ),
    ],
)
def test_a_table_with_too_little_is_told_in_a_line(tmp_path, kind, rows, message):
    frames = tables()
    frames[kind] = rows(frames[kind])
    with pytest.raises(TimingError, match=message):
        imported(write(tmp_path, "flat", frames))


@pytest.mark.parametrize(
    "text", ["gpu: {mem_bw: 1}", "gpu: [", "gpu: {mem_bw: 0, mem_capacity: 1}\nnode: {pcie_bw: 1}", ""]
)
def test_a_gpu_file_without_what_is_needed_is_named(tmp_path, text):
    folder = write(tmp_path, "flat", tables())
    (folder / "toy.yaml").write_text(text)
    with pytest.raises(TimingError, match=r"toy.yaml: needs gpu.mem_bw, gpu.mem_capacity and node.pcie_bw"):
        imported(folder)


def test_no_row_is_faster_than_the_memory(tmp_path):
    """Weights and KV that stayed in the L2 cache: rows of one token take bytes / bandwidth, and say so."""
    frames = tables()
    for kind in ("gemm", "generation", "moe"):
        frames[kind]["latency"] *= 0.02
    timings = imported(write(tmp_path, "flat", frames))
    assert timings.implausible() == []
    qkv = 2 * SHAPE.qkv_width * 1024
    assert timings.dense_pre(1) == pytest.approx(
        qkv / 1e12 + (8 * 1024 + 4 * SHAPE.qkv_width) / 0.8e12 + 6e-6, rel=1e-6
    )
    assert timings.attention_decode(8, 1023) == pytest.approx(8 * 1023 * 2 * 4 * 64 * 2 / 1e12, rel=1e-6)
    one = 2 * 3 * 1024 * 512 / 1e12
    assert timings.expert(1) == pytest.approx(one, rel=1e-6)
    floored = {(p.step, p.tokens): p.source for p in timings.points if p.context in (None, 1023)}
    assert floored["dense_pre", 1] == floored["expert", 1] == floored["attention_decode", 8] == "modelled"
    assert floored["dense_pre", 1024] == "imported"
    told = timings.modelled["faster than the memory"]
    assert "bytes / bandwidth" in told
    assert "6 of dense_pre" in told
    assert "of attention_decode" in told
    assert "of expert" in told


def test_layers_with_a_window_do_not_count_as_full_attention(tmp_path):
    frames, shape = tables(), replace(SHAPE, window=128, window_layers=3)
    for kind, at in (("context", "isl"), ("generation", "step")):
        frames[kind] = pd.concat(
            frames[kind].assign(window_size=window, latency=lambda t, w=window: t["latency"] * (0.5 if w else 1))
            for window in (0, 128)
        )
        assert at in frames[kind]
    folder = write(tmp_path, "flat", frames)
    timings = imported(folder, shape=shape)
    assert timings.attention_decode(8, 127) == pytest.approx((1 / 4 + 3 / 4 / 2) * 1e-8 * 8 * 227)
    assert timings.attention_prefill(128, 0) == pytest.approx((1 / 4 + 3 / 4 / 2) * 1e-9 * 128**2)
    # 1,024 tokens over 32,768: nearly all of the time is that of the layer without a window
    full = imported(folder).attention_prefill(1024, 32768)
    assert timings.attention_prefill(1024, 32768) == pytest.approx(full / 4, rel=0.03)
    assert timings.modelled["sliding window"].startswith(
        "attention is the mean over 4 layers, of which 3 see the last 128"
    )
    assert timings.least_s["attention_decode"][1] == imported(folder).least_s["attention_decode"][1] / 4
    with pytest.raises(TimingError, match=r"no rows with window_size = 64; .* there are: 0, 128"):
        imported(folder, shape=replace(shape, window=64))
    with pytest.raises(TimingError, match="column 'window_size' is missing, so rows with window_size = 128 cannot"):
        imported(write(tmp_path / "old", "flat", tables()), shape=shape)


def test_sizes_of_weights_follow_the_kernels_type(tmp_path):
    frames = tables()
    frames["moe"]["moe_dtype"] = "w4a16_mxfp4"
    frames["gemm"]["gemm_dtype"] = "fp8_block"
    folder = write(tmp_path, "flat", frames)
    kinds = {"moe_dtype": "w4a16_mxfp4", "gemm_dtype": "fp8_block"}
    assert imported(folder, **kinds).weights_bytes == SHAPE.weights_bytes("mxfp4", "fp8")
    assert imported(folder, **kinds, expert_weights="fp8").weights_bytes == SHAPE.weights_bytes("fp8", "fp8")
    with pytest.raises(TimingError, match="expert_weights: unknown type of weights 'fp7'; allowed: bf16, fp16"):
        imported(folder, **kinds, expert_weights="fp7")
    frames["moe"]["moe_dtype"] = "fp3"
    with pytest.raises(TimingError, match="expert_weights must be given, since the weights of 'fp3' are not known"):
        imported(write(tmp_path, "flat", frames), **{**kinds, "moe_dtype": "fp3"})


def test_weights_beyond_the_memory_are_told(tmp_path):
    folder = write(tmp_path, "flat", tables())
    with pytest.warns(TimingWarning, match=r"weights of 2.1 GB do not fit in 1.0 GB of memory"):
        imported(folder, shape=replace(SHAPE, vocab=10**6 // 2, layers=1, tied=False))


def test_slow_kernels_name_a_framework_that_is_faster(tmp_path):
    """As vLLM's FP8 GEMMs: 30 us whatever the size, on the host's account."""
    folder = write(tmp_path, "nested", tables())
    for op, kind, stem in (
        ("gemm", "gemm", "gemm_perf"),
        ("moe", "moe", "moe_perf"),
        ("attention", "generation", "generation_attention_perf"),
        ("attention", "context", "context_attention_perf"),
    ):
        path = folder / "data" / "toy" / op / "slow" / "1.0" / f"{stem}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        slow = tables()[kind]
        slow.assign(latency=slow["latency"] + (0.03 if kind == "gemm" else 0.0)).to_parquet(path)
    with pytest.warns(TimingWarning) as caught:
        timings = imported(folder, dense="slow")
    (line,) = [str(warning.message) for warning in caught]
    assert "dense_post at 2 tokens takes 65.15 us" in line
    assert "us by slow:1.0, " in line
    assert "times what the GPU needs at least, and " in line
    assert line.endswith("us by sglang; --dense sglang")
    timings.save(tmp_path / "t.csv")
    with pytest.warns(TimingWarning, match="--dense sglang"):  # the file keeps it
        assert Timings.load(tmp_path / "t.csv").conditions["implausible"]
    assert imported(folder).implausible() == []


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
