"""A trace modelled from a data sheet: more work or a slower GPU never takes less time, and files keep it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.traces import SHAPES, TimingError, Timings
from qllm.traces.step_times.data_sheet import DATA_SHEETS, Gpu, data_sheet_name, gpu_named
from qllm.traces.step_times.file_format import STEPS
from qllm.traces.step_times.model_shapes import WEIGHT_BYTES, ModelShape, known_model
from qllm.traces.step_times.modelled import Costs, roofline_timings, seen
from qllm.traces.step_times.roofline import times_least

MODELS = sorted(SHAPES)
DTYPES = sorted(WEIGHT_BYTES)


@st.composite
def gpus(draw) -> Gpu:
    flops = draw(st.floats(1e13, 3e15))
    return Gpu(
        draw(st.floats(1e11, 1e13)),
        flops,
        draw(st.sampled_from((0.0, 2 * flops))),
        draw(st.sampled_from((0.0, 4 * flops))),
        draw(st.integers(1 << 33, 1 << 39)),
        64e9,
        "some GPU",
    )


def seconds(timings: Timings) -> dict[tuple[str, int, int | None], float]:
    return {point[:3]: point.seconds for point in timings.points}


@settings(max_examples=25, deadline=None)
@given(gpus(), st.sampled_from(MODELS), st.sampled_from(DTYPES))
def test_a_step_never_gets_faster_with_more_tokens_or_context(gpu, model, dtype):
    timings = roofline_timings(SHAPES[model], gpu, dtype=dtype)
    assert all(row["cleaned_max"] < 1e-5 for row in timings.describe()["steps"].values())  # rounded to six digits
    assert {point.source for point in timings.points} == {"modelled"}
    assert timings.source == "modelled"


@settings(max_examples=25, deadline=None)
@given(gpus(), st.sampled_from(MODELS), st.sampled_from(DTYPES), st.floats(1, 4), st.floats(1, 4))
def test_a_faster_gpu_never_takes_longer(gpu, model, dtype, wider, quicker):
    slow = seconds(roofline_timings(SHAPES[model], gpu, dtype=dtype))
    faster = gpu._replace(
        bandwidth=wider * gpu.bandwidth,
        **{key: quicker * getattr(gpu, key) for key in ("flops", "fp8_flops", "fp4_flops")},
    )
    fast = seconds(roofline_timings(SHAPES[model], faster, dtype=dtype))
    assert all(fast[size] <= slow[size] * (1 + 1e-5) for size in slow)


@settings(max_examples=25, deadline=None)
@given(gpus(), st.sampled_from(MODELS), st.sampled_from(DTYPES))
def test_no_step_is_below_the_roofline(gpu, model, dtype):
    timings = roofline_timings(SHAPES[model], gpu, dtype=dtype)
    assert all(low > 0.999 for low, _ in times_least(timings, timings.points).values())
    assert [line for line in timings.implausible() if "do not fit" not in line] == []


@settings(max_examples=10, deadline=None)
@given(gpu=gpus(), model=st.sampled_from(MODELS), dtype=st.sampled_from(DTYPES))
@pytest.mark.filterwarnings("ignore::qllm.traces.step_times.file_format.TimingWarning")
def test_a_written_trace_is_read_back_equal(tmp_path_factory, gpu, model, dtype):
    timings = roofline_timings(SHAPES[model], gpu, dtype=dtype)
    path = tmp_path_factory.mktemp("traces") / "t.csv"
    timings.save(path)
    again = Timings.load(path)
    assert seconds(again) == seconds(timings)
    assert replace(again, points=timings.points) == timings


@given(st.integers(0, 3000), st.integers(0, 300))
def test_tokens_see_no_more_than_their_window(tokens, window):
    pairs = sum(min(at, window) if window else at for at in range(1, tokens + 1))
    assert seen(tokens, window) == pytest.approx(pairs, abs=tokens)  # a token sees half of itself


def test_a_window_caps_what_attention_reads():
    gpu, shape = DATA_SHEETS["h100_sxm"], SHAPES["gpt-oss-20b"]
    costs = Costs(attention_s=0.0)
    windowed = roofline_timings(replace(shape, window_layers=shape.layers), gpu, costs=costs)
    assert windowed.attention_decode(32, 65536) == windowed.attention_decode(32, 256)
    half, full = (roofline_timings(one, gpu, costs=costs) for one in (shape, replace(shape, window=0, window_layers=0)))
    assert 2 * half.kv_bytes_per_token == full.kv_bytes_per_token == windowed.kv_bytes_per_token
    assert half.sequence_bytes == shape.window * half.kv_bytes_per_token
    assert full.sequence_bytes == windowed.sequence_bytes == 0, "the engine keeps all where each layer has a window"
    assert half.attention_decode(32, 65536) == pytest.approx(full.attention_decode(32, 65536) / 2, rel=0.01)
    assert half.attention_prefill(4096, 65536) == pytest.approx(full.attention_prefill(4096, 65536) / 2, rel=0.01)


def test_latent_attention_keeps_and_reads_its_latents():
    shape = SHAPES["deepseek-v3"]
    assert shape.kv_bytes_per_token() == 61 * (512 + 64) * 2
    costs = Costs(memory_efficiency=1.0, attention_efficiency=1.0)
    for gpu in (DATA_SHEETS["h200_sxm"], DATA_SHEETS["h200_sxm"]._replace(flops=1e16)):
        timings = roofline_timings(shape, gpu, dtype="fp8", costs=costs)
        more = timings.attention_decode(1, 65536) - timings.attention_decode(1, 32768)
        read, worked = 576 * 2 / gpu.bandwidth, 2 * 128 * (576 + 512) / gpu.flops
        assert more == pytest.approx(32768 * max(read, worked), rel=1e-3)
    plain = ModelShape("plain", 61, 7168, 128, 128, 128, 2048, 256, 8, 129280)
    assert plain.kv_bytes_per_token() == 61 * 2 * 128 * 128 * 2


def test_a_model_too_large_says_so():
    timings = roofline_timings(SHAPES["deepseek-v3"], DATA_SHEETS["b200_sxm"], dtype="fp8")
    assert "The weights do not fit in one such GPU" in timings.provenance
    assert timings.implausible() == ["weights of 671.0 GB do not fit in 193.3 GB of memory"]
    assert "do not fit" not in roofline_timings(SHAPES["mixtral-8x7b"], DATA_SHEETS["b200_sxm"]).provenance


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"gemm_efficiency": 0.0}, "gemm_efficiency is 0.0, must be above 0 and at most 1"),
        ({"memory_efficiency": 1.5}, "memory_efficiency is 1.5, must be above 0 and at most 1"),
        ({"expert_efficiency": float("nan")}, "expert_efficiency is nan, must be above 0"),
        ({"kernel_s": -1e-6}, "kernel_s is -1e-06, must be at least 0 seconds"),
        ({"host_s": float("inf")}, "host_s is inf, must be at least 0 seconds"),
    ],
)
def test_impossible_costs_are_named(costs, message):
    with pytest.raises(TimingError, match=message):
        Costs(**costs)


def test_unknown_types_and_gpus_without_numbers_are_named():
    shape, gpu = SHAPES["mixtral-8x7b"], DATA_SHEETS["a100_sxm"]
    with pytest.raises(TimingError, match="dtype: unknown type of weights 'fp7'; did you mean 'fp8'"):
        roofline_timings(shape, gpu, dtype="fp7")
    with pytest.raises(TimingError, match="other_dtype: unknown type of weights 'x'; allowed: bf16"):
        roofline_timings(shape, gpu, other_dtype="x")
    for key in ("bandwidth", "flops", "memory", "host_bandwidth"):
        with pytest.raises(TimingError, match=f"{key} of the GPU is 0, must be above 0"):
            roofline_timings(shape, gpu._replace(**{key: 0}))


def test_names_of_gpus_and_models():
    assert [data_sheet_name(name) for name in ("H200", "h200_sxm", "h100-pcie", "L40S")] == [
        *("h200_sxm", "h200_sxm", "h100_pcie", "l40s")
    ]
    with pytest.raises(TimingError, match=r"unknown GPU 'h300'; .*allowed: a100_sxm, a100_pcie"):
        data_sheet_name("h300")
    assert known_model("Qwen/Qwen3-30B-A3B") == "qwen3-30b-a3b"
    with pytest.raises(TimingError, match="unknown model 'mixtral'; did you mean 'mixtral-8x7b'"):
        known_model("mixtral")


@pytest.mark.parametrize("name", sorted(DATA_SHEETS))
def test_data_sheets_agree_with_the_plausible_limits_of_that_name(name):
    """What judges a trace by its device's name is never stricter than the data sheet."""
    gpu = DATA_SHEETS[name]
    limit = gpu_named(gpu.device)
    assert limit is not None
    assert gpu.bandwidth <= 1.01 * limit.bandwidth
    assert gpu.flops <= 1.01 * limit.flops
    assert gpu.peak(16) <= gpu.peak(8) <= gpu.peak(4)


def test_all_steps_are_there():
    assert roofline_timings(SHAPES["olmoe-1b-7b"], DATA_SHEETS["a10"]).steps == STEPS
