"""The engine over kernels and replayed passes: under every policy, with evictions, the tokens of a CPU's."""

import pytest

import qllm.executor.engine.engine as engine_module
from qllm.executor.engine.engine import Engine
from qllm.executor.graphs.runner import GraphRunner
from qllm.executor.model.loading import prepare_model
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits, make_policy
from tests.gpu.plain import plain_kernels
from tests.gpu.tape import TapeRecorder
from tests.gpu.worlds import unpacked

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")
assert plain_kernels  # a fixture of this module
LIMITS = Limits(max_seqs=4, max_batched_tokens=48, kv_blocks=60, block_size=4)
PROMPTS = [[(11 * i + 3 * n) % 93 + 3 for i in range(length)] for n, length in enumerate((3, 40, 17, 8, 30, 1, 22, 64))]


@pytest.fixture(scope="module")
def right():
    """The tokens of each prompt, by the engine on a CPU."""
    model = prepare_model(tiny_model("qwen3_moe", num_hidden_layers=2))
    with Engine(model, policy="fcfs", limits=LIMITS, seed=0) as engine:
        return [stream.result().tokens for stream in submitted(engine)]


@pytest.fixture
def runners(monkeypatch):
    """The runners of the engines that are made."""
    made = []

    def make(*args, **settings):
        settings["graphs"] = "use" if settings["graphs"] == "load" else settings["graphs"]  # all buckets take seconds
        made.append(GraphRunner(*args, **settings, kernels=True, recorder=TapeRecorder))
        return made[-1]

    monkeypatch.setattr(engine_module, "GraphRunner", make)
    return made


def submitted(engine, **settings):
    return [
        engine.submit(prompt, max_new_tokens=6, priority=number % 2, stop=[], **settings)
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "chunked", "layer", "qllm", "hybrid"])
@pytest.mark.parametrize("graphs", ["load", "off"])
def test_every_policy_gives_the_same_tokens(runners, right, policy, graphs):
    with Engine(unpacked(num_hidden_layers=2), policy=policy, limits=LIMITS, seed=0, graphs=graphs) as engine:
        assert [stream.result().tokens for stream in submitted(engine)] == right
        assert engine.stats().free_blocks == 60
    assert bool(runners[0].recorded) == (graphs == "load")
    assert all(each.free for some in runners[0].recorded.values() for each in some)


def test_merging_passes_run_eagerly_and_give_the_same_tokens(runners, right):
    policy = make_policy("qllm", merge=True)
    with Engine(unpacked(num_hidden_layers=2), policy=policy, limits=LIMITS, seed=0) as engine:
        assert [stream.result().tokens for stream in submitted(engine)] == right
    assert not runners[0].recorded


@pytest.mark.parametrize("evict", ["recompute", "offload"])
def test_evictions_change_no_token(runners, right, evict):
    limits = Limits(max_seqs=4, max_batched_tokens=48, kv_blocks=26, block_size=4, evict=evict)
    with Engine(unpacked(num_hidden_layers=2), policy="qllm", limits=limits, seed=0) as engine:
        assert [stream.result().tokens for stream in submitted(engine)] == right
    assert runners


def test_cancelled_requests_leave_their_bucket_free(runners, right):
    with Engine(unpacked(num_hidden_layers=2), policy="qllm", limits=LIMITS, seed=0) as engine:
        for at in range(8):
            streams = submitted(engine)
            for stream in streams[at::2]:
                stream.cancel()
            for number, stream in enumerate(streams):
                tokens = stream.result().tokens
                assert tokens == right[number][: len(tokens)]
    assert all(each.free for some in runners[0].recorded.values() for each in some)


def test_drawn_tokens_are_those_of_an_eager_engine(runners):
    found = []
    for graphs in ("load", "off"):
        with Engine(unpacked(num_hidden_layers=2), policy="qllm", limits=LIMITS, seed=0, graphs=graphs) as engine:
            streams = submitted(engine, temperature=0.8, top_k=20, top_p=0.9, seed=5)
            found.append([stream.result().tokens for stream in streams])
    assert found[0] == found[1]


def test_a_request_whose_pass_breaks_between_two_pieces_ends_alone(runners, right, monkeypatch):
    with Engine(unpacked(num_hidden_layers=2), policy="fcfs", limits=LIMITS, seed=0) as engine:
        assert engine.submit(PROMPTS[0], max_new_tokens=6, stop=[]).result().tokens == right[0]
        pieces = [piece for some in runners[0].recorded.values() for each in some for _, piece in each._pieces]
        broken = pieces[2]
        monkeypatch.setattr(broken, "replay", breaks)
        with pytest.raises(Exception, match="lost"):
            engine.submit(PROMPTS[0], max_new_tokens=6, stop=[]).result()
        monkeypatch.undo()
    assert all(each.free for some in runners[0].recorded.values() for each in some)


def breaks():
    raise RuntimeError("the device is lost")
