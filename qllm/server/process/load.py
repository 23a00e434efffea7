"""The engine that a server runs on: a checkpoint, or the demo's random model."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from qllm.executor import Engine, Grammar, LoadError, prepare_model
from qllm.executor.errors import GrammarError
from qllm.server.process import demo
from qllm.server.settings import ServerSettings


def load_engine(
    model: str | None,
    settings: ServerSettings,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    graphs: str,
    experts: str = "plain",
) -> tuple[Engine, str]:
    """An engine with these settings, and the name of its model.

    Raises:
        ExecutorError: the model cannot be loaded or served, or does not fit.
        SchedulerError: the policy or the limits are not possible.
    """
    given: dict[str, Any] = {
        "policy": settings.policy.build(),
        "limits": settings.engine.build(),
        "max_step": settings.max_step,
        "graphs": graphs,
    }
    if model is not None:
        given |= {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code, "experts": experts}
        engine = Engine.from_pretrained(model, **given)
        with suppress(GrammarError):  # without the extra, or a fast tokenizer
            engine.compile(Grammar.regex(""))  # reads the tokenizer; other requests would stand still meanwhile
        return engine, model.rstrip("/").split("/")[-1]
    kinds = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise LoadError(f"dtype is {dtype!r:.80}; allowed: {', '.join(kinds)}")
    tokenizer: Any = demo.demo_tokenizer()
    made = prepare_model(demo.demo_model(len(tokenizer), device, kinds[dtype]), experts=experts)
    return Engine(made, tokenizer, **given), demo.NAME
