"""Bits, tokens, KV's way to the host, and calibration."""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from gpu_parts.world import BLOCK, FEWEST, NoTime, World, graph_setting, middle, one_line, rewind
from qllm.executor.calibration import profiler
from qllm.executor.calibration.calibrate import Extent, calibrate
from qllm.executor.calibration.store import MeasurementStore
from qllm.executor.engine.engine import Engine
from qllm.executor.errors import UnsupportedModelError
from qllm.executor.model.loading import load, prepare_model
from qllm.executor.model.runner import Runner, run_to_end
from qllm.executor.testing import families as all_families
from qllm.executor.testing import tiny_model
from qllm.scheduler import Limits

WIDE = 0.1  # interquartile range over mean, from where a kind of pass scatters
CALIBRATE_S = 120.0  # the goal: one that takes longer has missed it
LS_DECODES = 8  # sequences of the LS decode between two points
PROMPTS = (5, 21, 12)  # tokens, for a family
NEW_TOKENS = 8
WAYS = ((1e-5, "off"), (1e-2, "use"))  # to serve a family: cut wherever a pass can be, and in graphs


def bits(world: World) -> None:
    """A BE pass suspended at its points, with an LS pass at each, against the same passes alone."""
    world.engine().call(lambda loop: _bits(world, loop.runner))


def _bits(world: World, runner: Runner) -> None:
    sizes = world.sizes
    decodes = min(LS_DECODES, sizes.batch)
    entries = world.sequences(runner, [(sizes.long, 0), (sizes.prompt, 0), *[(1, sizes.context)] * decodes])
    be, urgent = entries[:1], (entries[1:2], entries[2:])
    alone = []
    for some in (be, *urgent):
        alone.append(run_to_end(runner.begin(some)).clone())
        rewind(some)
    differ = torch.zeros((), dtype=torch.int64, device=world.device)
    stops = passes = 0
    while stops < sizes.stops and (not passes or world.left > 0):
        running = runner.begin(be)
        while running.advance() is not None:
            if stops == sizes.stops or (stops >= FEWEST and world.left < 0):
                continue
            which = stops % 2
            differ += differing(run_to_end(runner.begin(urgent[which])), alone[1 + which])
            rewind(urgent[which])
            stops += 1
        differ += differing(running.logits, alone[0])
        rewind(be)
        passes += 1
    world.say("differing_bits", int(differ), f"logits of {passes} BE passes and {stops} LS passes that differ")
    world.say("suspensions", stops)


def differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers differ in a bit."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.view(kind) != b.view(kind)).sum()


def kv(world: World) -> None:
    """KV of one long sequence to host memory and back."""

    def run(runner: Runner) -> None:
        blocks, ring = range(world.sizes.moved // BLOCK), runner.cache.ring_of(world.sizes.moved)
        there, back = [], []
        for repeat in range(-1, 7):  # the first one makes the buffers
            world.synchronize()
            start = time.perf_counter()
            moved = runner.cache.offload(blocks, world.sizes.moved, ring)
            world.synchronize()
            away = time.perf_counter()
            runner.cache.restore(moved, blocks, ring)
            world.synchronize()
            end = time.perf_counter()
            if repeat >= 0:
                there.append(moved.nbytes / (away - start) / 1e9)
                back.append(moved.nbytes / (end - away) / 1e9)
            size = moved.nbytes
            del moved  # its buffers may be used again
        world.say("kv_to_host", middle(there), f"{size / 1e9:.2f} GB, slowest {min(there):.1f}")
        world.say("kv_back", middle(back), f"slowest {min(back):.1f}")

    world.engine().call(lambda loop: run(loop.runner))


# ---- families --------------------------------------------------------------------------------------------------


def families(world: World) -> None:
    """Tiny models of all families in float32: tokens of the engine against `generate` with transformers' own code."""
    world.close()
    same, other, refused, broken = 0, list[str](), list[str](), list[str]()
    names = all_families()[: world.sizes.families]
    for name in names:
        if world.left < 0:
            break
        try:
            model = tiny_model(name).to(world.device)
            expected = [_generated(model, prompt) for prompt in _prompts()]
        except Exception as error:  # no tiny model of it is known, or transformers cannot run it here
            refused.append(f"{name} ({one_line(error)})")
            continue
        try:
            prepare_model(model)
            if all(_served(model, max_step, graphs) == expected for max_step, graphs in WAYS):
                same += 1
            else:
                other.append(name)
        except UnsupportedModelError as error:
            refused.append(f"{name} ({error})")
        except Exception as error:
            broken.append(f"{name} ({one_line(error)})")
    tried = same + len(other) + len(broken)
    if not tried:
        raise RuntimeError(f"no family could be tried: {refused[-1:]}")
    world.say("families_wrong", len(other) + len(broken), ", ".join(other + broken))
    world.say("families_tried", tried, f"of {tried + len(refused)}; {len(names)} there are; the others are refused")


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in PROMPTS]


def _generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def _served(model: PreTrainedModel, max_step: float, graphs: str) -> list[list[int]]:
    """The engine's tokens, two prompts BE and one LS, so that passes are suspended and decode together."""
    limits = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=64, block_size=4)
    with Engine(model, limits=limits, max_step=max_step, seed=0, **graph_setting(Engine, graphs)) as engine:
        streams = [
            engine.submit(prompt, max_new_tokens=NEW_TOKENS, priority=number % 2, stop=())
            for number, prompt in enumerate(_prompts(), start=1)
        ]
        return [stream.result().tokens for stream in streams]


# ---- calibration -----------------------------------------------------------------------------------------------


def calibration(world: World) -> None:
    """`qllm calibrate` of two layers; its file of measurements is kept by a second name, to see what scatters."""
    world.close()
    start, over = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder:
        out, kept = Path(folder) / "timings.csv", Path(folder) / "kept"
        world.config(layers=2).save_pretrained(folder)
        loaded = load(folder, device=str(world.device), dtype="bfloat16", random_weights=True)

        def progress(done: int, planned: int) -> None:
            with suppress(FileExistsError):
                os.link(out.with_name(out.name + ".measured"), kept)
            if world.left < 0:
                raise NoTime(f"for more than {done} of {planned} passes")

        try:
            with patch.object(profiler, "SAMPLING_S", min(profiler.SAMPLING_S, world.sizes.seconds)):
                calibrate(loaded, out, Extent(*world.sizes.extent), progress)
        except NoTime as error:
            over = str(error)
        seconds = time.monotonic() - start
        subject = json.loads(kept.read_text(encoding="utf-8").partition("\n")[0])["subject"]
        samples = MeasurementStore(kept, subject).samples
    shares = [found.spread() / found.total() for found in samples.values() if found.repeats > 1]
    wide = sorted((share for share in shares if share > WIDE), reverse=True)
    told = f"of {len(samples)} kinds" + (f", widest {wide[0]:.0%}" if wide else "")
    world.say("calibrate_wide", len(wide), " ".join(f"{told} {over and 'so far'}".split()))
    if over and seconds < CALIBRATE_S:
        raise NoTime(over)
    world.say(
        "calibrate_s", seconds, f"no time {over}" if over else f"{sum(s.repeats for s in samples.values())} passes"
    )
