"""Which experts real prompts use, as an expert popularity table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from qllm.executor.engine.text import load_tokenizer, prompt_ids
from qllm.executor.errors import CalibrationError
from qllm.executor.model.loading import LoadedModel
from qllm.executor.model.packed_batch import Sequence
from qllm.executor.model.runner import Runner
from qllm.traces.comment_header import render_header
from qllm.traces.step_times.popularity import COLUMNS

BLOCK = 16


def record_popularity(loaded: LoadedModel, name_or_path: str, prompts: Path, out: Path, max_tokens: int) -> int:
    """Write to `out` what share of each layer's tokens each expert gets of `prompts` (one a line); the tokens run.

    CalibrationError: there is no tokenizer, no prompt, or no trained weights. LoadError: the tokenizer is damaged.
    """
    if loaded.weights != "checkpoint":
        raise CalibrationError(f"--prompts: the routing of weights that are {loaded.weights} says nothing")
    tokenizer = load_tokenizer(name_or_path)
    if tokenizer is None:
        raise CalibrationError(f"--prompts needs a tokenizer, and {name_or_path} has none")
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise CalibrationError(f"--prompts {prompts}: holds no prompt; one a line is needed")
    sequences = (prompt_ids(tokenizer, line)[:max_tokens] for line in lines)
    counts, tokens = count_routing(loaded, sequences, max_tokens)
    header = {
        "source": f"measured by qllm calibrate: {len(lines)} prompts, {tokens} tokens of {prompts.name}",
        "model": loaded.name,
        "date": date.today().isoformat(),
    }
    write_popularity(out, counts, header)
    return tokens


def count_routing(
    loaded: LoadedModel, sequences: Iterable[list[int]], max_tokens: int
) -> tuple[dict[int, np.ndarray], int]:
    """Rows of each expert by the layer's number, int64[experts], and the tokens of `sequences` (token ids)."""
    runner = Runner(loaded.model, -(-max_tokens // BLOCK), BLOCK)
    counts: dict[int, np.ndarray] = {}
    total = 0
    with torch.inference_mode():
        for tokens in sequences:
            if not tokens:
                continue
            total += len(tokens)
            running = runner.begin([(Sequence(tokens, [*range(runner.cache.n_blocks)]), len(tokens))])
            layers = []
            while (point := running.advance()) is not None:
                if point.stage == "experts" and point.layer not in layers:
                    layers.append(point.layer)
            for layer, rows in zip(layers, running.routing, strict=True):
                counts[layer] = counts.get(layer, 0) + np.array(rows)
    return counts, total


def write_popularity(out: Path, counts: dict[int, np.ndarray], header: dict[str, str]) -> None:
    """Write `counts` (by layer, int64[experts]) as a table that `qllm.traces.step_times.popularity` reads."""
    with out.open("w", encoding="utf-8", newline="") as file:
        file.write(render_header(header))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer, rows in sorted(counts.items()):
            for expert, share in enumerate(rows / rows.sum()):
                writer.writerow([layer, expert, f"{share:.8f}"])
