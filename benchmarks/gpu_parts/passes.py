"""How long passes take, and what they cost the host. Passes run in the engine's thread, through its own runner."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.world import BLOCK, FEWEST, MAX_STEP, MOST, World, make_runner, middle, rewind
from qllm.executor.calibration.stopwatch import sample_greedily
from qllm.executor.model.hooks import NAME
from qllm.executor.model.passes import RunAhead, RunningPass
from qllm.executor.model.runner import Runner, run_to_end

FINE_STEP, COARSE_STEP = MAX_STEP, 5e-3  # seconds


def build(world: World) -> None:
    """Make the model and the engine, graphs included."""
    start = time.monotonic()
    _ = world.model
    made = time.monotonic()
    world.say("build_s", made - start)
    engine = world.engine()
    world.say("engine_s", time.monotonic() - made)
    recorded, splitter = engine.call(lambda loop: (getattr(loop.runner, "recorded", {}), loop.runner.splitter))
    world.fact("recorded_passes", sum(map(len, recorded.values())))
    world.fact("splitter", str(splitter))


def passes(world: World) -> None:
    """Short passes, as graphs where the runner has them."""

    def run(runner: Runner) -> None:
        world.fill()
        sizes, end = world.sizes, world.until
        cases = {
            "prefill_128": [(sizes.prompt, 0)],
            "decode_1": [(1, sizes.context)],
            "decode_32": [(1, sizes.context)] * sizes.batch,
        }
        for number, (name, rows) in enumerate(cases.items()):
            now = time.monotonic()
            world.until = now + max(0.0, end - now) / (len(cases) - number)
            times, points = world.times(runner, world.sequences(runner, rows))
            told = f"{points} points, fastest {min(times):.2f}, slowest {max(times):.2f}"
            world.say(name, middle(times), told)

    world.engine().call(lambda loop: run(loop.runner))


def prefill(world: World) -> None:
    """A long prompt, cut by the engine's splitter."""
    _cut(world, FINE_STEP, "prefill_8192_2ms", "load")


def prefill_5ms(world: World) -> None:
    """The same prompt with fewer cuts."""
    _cut(world, COARSE_STEP, "prefill_8192_5ms", "off")  # a pass of that length fits no bucket


def _cut(world: World, max_step: float, name: str, graphs: str) -> None:
    def run(runner: Runner) -> None:
        times, points = world.times(runner, world.sequences(runner, [(world.sizes.long, 0)]))
        world.say(name, middle(times), f"{points} points")

    world.engine(max_step=max_step, graphs=graphs).call(lambda loop: run(loop.runner))


def transformers(world: World) -> None:
    """The same prompt through transformers' own code, on the same weights."""
    model, ids = world.model, torch.tensor([world.tokens(world.sizes.long)], device=world.device)
    times: list[float] = []
    try:
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("grouped_mm")
        with torch.inference_mode():
            for repeat in range(-1, 7):
                world.synchronize()
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
                world.synchronize()
                if repeat >= 0:
                    times.append(1e3 * (time.perf_counter() - start))
    finally:
        model.set_attn_implementation(NAME)
        model.set_experts_implementation(NAME)
    world.say("prefill_8192_transformers", middle(times), "its forward, grouped_mm and sdpa, without KV")


def points(world: World) -> None:
    """A decode pass that stops at its points, and one that never does: runners of their own, which take turns."""
    sizes = world.sizes
    blocks = sizes.batch * -(-(sizes.context + 1) // BLOCK) + 1
    off = patch.object(RunningPass, "reach", lambda *_: None)  # a graph captured so is of one piece
    ratios, found = [], {"on": [0.0], "off": [0.0]}
    with torch.inference_mode():
        runners, entries = {}, {}
        for name in found:
            with ExitStack() as stack:
                if name == "off":
                    stack.enter_context(off)
                runners[name] = make_runner(world.model, blocks)
                entries[name] = world.sequences(runners[name], [(1, sizes.context)] * sizes.batch)
                found[name] = [_once(world, runners[name], entries[name]) for _ in range(2)]  # captured, warm
        for repeat in range(MOST):
            if world.left < 0 and repeat >= FEWEST:
                break
            on = _once(world, runners["on"], entries["on"])
            with off:
                without = _once(world, runners["off"], entries["off"])
            ratios.append(on / without)
            found["on"].append(on)
            found["off"].append(without)
    kind = "graphs" if getattr(runners["on"], "recorded", None) else "eager"
    told = f"{kind}; {statistics.median(found['on'][2:]):.2f} and {statistics.median(found['off'][2:]):.2f} ms"
    world.say("points_on_off", middle(ratios), told)


def _once(world: World, runner: Runner, entries: list) -> float:
    """Milliseconds of a pass, with what an engine does at each point: a look at the clock."""
    world.synchronize()
    start = time.perf_counter()
    running = runner.begin(entries)
    while running.advance() is not None:
        time.monotonic()
    world.synchronize()
    rewind(entries)
    return 1e3 * (time.perf_counter() - start)


def host(world: World) -> None:
    """What a decode pass costs the host: up to its last launch, without its waits for the device, and for sampling."""
    world.engine().call(lambda loop: _host(world, loop.runner))


def _host(world: World, runner: Runner) -> None:
    entries = world.sequences(runner, [(1, world.sizes.context)] * world.sizes.batch)
    launching, sampling, waits = [], [], list[float]()

    def wait(event: torch.Event) -> None:
        begin = time.perf_counter()
        event.synchronize()
        waits.append(time.perf_counter() - begin)

    # As it is served: were more than a step in flight, launches themselves would wait for room in the device's queue.
    with patch.object(RunAhead, "wait", staticmethod(wait)):
        for repeat in range(-2, MOST):
            world.synchronize()
            waits.clear()
            start = time.perf_counter()
            running = runner.begin(entries)
            run_to_end(running)
            launched = time.perf_counter()
            world.synchronize()
            ready = time.perf_counter()
            sample_greedily(running)
            end = time.perf_counter()
            rewind(entries)
            if repeat >= 0:
                launching.append(1e3 * (launched - start - sum(waits)))
                sampling.append(1e3 * (end - ready))
            if world.left < 0 and len(launching) >= FEWEST:
                break
    on_device = _largest_ms(world, running.logits)
    sampled = max(0.0, middle(sampling) - on_device)
    world.say("host_launch_ms", middle(launching), "waits for the device left out")
    world.say("host_sample_ms", sampled, f"{on_device:.3f} ms of the device, for the largest logits, taken off")
    world.say("host_ms", middle(launching) + sampled)


def _largest_ms(world: World, logits: torch.Tensor) -> float:
    """Milliseconds that a GPU takes to find each row's largest logit."""
    if world.device.type == "cpu":
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    logits.max(dim=-1)
    start.record()
    for _ in range(20):
        logits.max(dim=-1)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 20


def launches(world: World) -> None:
    """Kernels and launches of a decode pass."""

    def run(runner: Runner) -> None:
        entries = world.sequences(runner, [(1, world.sizes.context)] * world.sizes.batch)
        world.times(runner, entries)  # whatever is made at first use is there

        def once() -> None:
            run_to_end(runner.begin(entries))
            rewind(entries)

        kernels, calls, busy = traced(world, once)
        layers = int(world.model.config.num_hidden_layers)
        world.say("kernels_a_layer", kernels / layers, f"{kernels} in the pass, {busy:.2f} ms in all")
        started = sum(n for name, n in calls.items() if "Launch" in name)
        waits = {name: n for name, n in calls.items() if "ynchronize" in name}
        world.say("launches_a_pass", started, ", ".join(f"{n} {name}" for name, n in waits.items()) or "no wait seen")

    traced(world, lambda: None)  # the profiler wants to be started in this thread first
    world.any_engine().call(lambda loop: run(loop.runner))


def traced(world: World, what: Callable[[], object]) -> tuple[int, dict[str, int], float]:
    """Of `what`: kernels (on a CPU operators), the runtime's calls by name, milliseconds that the kernels take."""
    gpu = world.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    world.synchronize()
    with profile(activities=kinds) as profiler:
        what()
        world.synchronize()
    count, busy, calls = 0, 0.0, dict[str, int]()
    for event in profiler.events() or ():
        if gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            count += 1
            busy += event.device_time_total
        elif gpu and event.name.startswith("cu"):
            calls[event.name] = calls.get(event.name, 0) + 1
        elif not gpu and event.cpu_parent is None:
            count += 1
    return count, calls, busy / 1e3
