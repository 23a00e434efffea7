"""Odd arguments of `Engine`, `submit`, `Limits`: refused with the argument's name, or answered as the plain request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from qllm.executor.engine.engine import Engine
from qllm.executor.errors import ExecutorError
from qllm.scheduler import Limits, Policy, SchedulerError, make_policy
from tests.odd_inputs.cases import ACCEPTED, Case, both, expect, refusal, tried

AREA = "engine"
PROMPT, NEW = [5, 6, 7, 8], 6
LIMITS = Limits(max_seqs=4, max_batched_tokens=64, kv_blocks=64)


class Words:
    """A tokenizer of words such as t5."""

    all_special_ids = ()
    bos_token_id = None
    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        numbers = [word.removeprefix("t") for word in text.split()]
        return [int(number) if number.lstrip("-").isdigit() else 1 for number in numbers]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"t{one}" for one in ids)


@cache
def served() -> tuple[Engine, list[int]]:
    """An engine for all cases of a process, and its greedy answer to the plain request."""
    from qllm.executor.model.loading import prepare_model
    from qllm.executor.testing import tiny_model

    engine = Engine(prepare_model(tiny_model("qwen3_moe")), limits=LIMITS, seed=0)
    return engine, engine.submit(PROMPT, max_new_tokens=NEW, stop=[]).result().tokens


NUMBERS: list[Any] = [
    *(None, "", "1", "x", b"1", True, False, -1, 0, 1, 2, 0.0, 0.5, 1.0, 1.5, 2.5, -0.5, math.nan, math.inf, -math.inf),
    *(10**30, 10**400, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, 1 << 64, -(1 << 63), 1e300, 5e-324, 1j, Decimal("0.5")),
    *(Fraction(1, 2), np.int64(2), np.float32(0.5), np.bool_(True), np.array(2), np.array([1]), np.nan),
    *(torch.tensor(2), torch.tensor([1]), [], [1], (), {}, {1}, object(), int, lambda: 1, range(3), Ellipsis),
]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | Fraction) and not isinstance(
        value, bool | np.bool_
    )


def is_whole(value: Any) -> bool:
    return is_number(value) and isinstance(value, int | np.integer)


#: What the documentation allows of each argument.
ALLOWED = {
    "max_new_tokens": lambda v: is_whole(v) and v >= 1,
    "priority": is_whole,
    "temperature": lambda v: is_number(v) and 0 <= v < math.inf,
    "top_k": lambda v: is_whole(v) and v >= 0,
    "top_p": lambda v: is_number(v) and 0 < v <= 1,
    "seed": lambda v: v is None or (is_whole(v) and 0 <= v < 2**64),
    "min_tokens": lambda v: is_whole(v) and v >= 0,
    "min_p": lambda v: is_number(v) and 0 <= v <= 1,
    "presence_penalty": lambda v: is_number(v) and -2 <= v <= 2,
    "frequency_penalty": lambda v: is_number(v) and -2 <= v <= 2,
    "repetition_penalty": lambda v: is_number(v) and 0.01 <= v <= 100,
    "logprobs": lambda v: v is None or (is_whole(v) and 0 <= v <= 20),
    "logit_bias": lambda v: v is None or v == {} or any(v is bias for bias in BIASES[:4]),
    "grammar": lambda v: v is None,
}
#: Biases of token ids: the first four are right.
BIASES = [
    *({95: -100}, {np.int64(5): 0.5, 6: Fraction(1, 2)}, {0: 100.0}, dict.fromkeys(range(96), 0)),
    *({96: 1}, {-1: 1}, {"5": 1}, {5.0: 1}, {True: 1}, {None: 1}, {5: None}, {5: "1"}, {5: math.nan}, {5: 101}),
    *({5: -(10**400)}, {10**400: 1}, {(5,): 1}, {5: 1j}, [(5, 1)], {5: [1]}),
]
#: Arguments that may change which tokens are chosen.
CHANGING = {"temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"}
NAMED = {"min_tokens": ("min_tokens",), "max_new_tokens": ("max_new_tokens", "positions")}


def _argument_case(name: str, value: Any) -> str:
    engine, right = served()
    given: dict[str, Any] = {"max_new_tokens": NEW, "stop": [], name: value}
    try:
        stream = engine.submit(PROMPT, **given)
    except ExecutorError as error:
        outcome = refusal(" ".join(str(error).split()), *NAMED.get(name, (name,)))
    else:
        expect(ALLOWED[name](value), "accepted, and it is not allowed")
        tokens = stream.result().tokens
        both("length", value if name == "max_new_tokens" else NEW, len(tokens))
        if name not in CHANGING:
            both("tokens", right[: len(tokens)], tokens[:NEW])
        outcome = ACCEPTED
    both("the next request", right, engine.submit(PROMPT, max_new_tokens=NEW, stop=[]).result().tokens)
    return outcome


def _id_lists() -> Iterator[tuple[Any, Any]]:
    """What may be given as token ids, and which ids these are; None: they are none."""
    yield from ((value, None) for value in (None, 5, 5.0, True, b"\5\6", object(), math.nan, int, {"a": 1}, Ellipsis))
    yield from (
        ([5, bad], None) for bad in (None, "6", 6.0, 6.5, True, -1, 96, 10**30, math.nan, [6], 1j, b"6", object())
    )
    yield from (
        (value, [5, 6]) for value in ([5, 6], (5, 6), range(5, 7), iter([5, 6]), (i for i in (5, 6)), {5: 1, 6: 2})
    )
    yield from ((np.array([5, 6], dtype=kind), [5, 6]) for kind in (np.int8, np.uint64, np.int64))
    yield np.array([5.0, 6.0]), None
    yield np.array([[5, 6]]), [5, 6]
    yield np.array([[5], [6]]), None
    yield np.array(5), None
    yield np.array(["5", "6"]), None
    yield torch.tensor([5, 6]), [5, 6]
    yield torch.tensor([5, 6], dtype=torch.int8), [5, 6]
    yield torch.tensor([[5, 6]]), [5, 6]
    yield torch.tensor([5.0, 6.0]), None
    yield torch.tensor([True, False]), None
    yield torch.tensor(5), None
    yield [torch.tensor(5), torch.tensor(6)], None
    yield [np.int64(5), np.int32(6)], [5, 6]
    yield [[5, 6]], [5, 6]
    yield [[5, 6], [7, 8]], None
    yield {"input_ids": [5, 6]}, [5, 6]
    yield {"input_ids": [[5, 6]]}, [5, 6]
    yield {"input_ids": torch.tensor([[5, 6]])}, [5, 6]
    yield {"input_ids": None}, None
    yield {"input_ids": "5 6"}, None


def _prompt_case(index: int) -> str:
    engine, right = served()
    prompt, ids = list(_id_lists())[index]
    try:
        stream = engine.submit(prompt, max_new_tokens=2, stop=[])
    except ExecutorError as error:
        expect(ids is None, f"refused: {error}")
        outcome = refusal(" ".join(str(error).split()), "prompt")
    else:
        expect(ids is not None, "accepted, and it is no prompt")
        both("prompt", ids, stream.prompt)
        both("tokens", engine.submit(ids, max_new_tokens=2, stop=[]).result().tokens, stream.result().tokens)
        outcome = ACCEPTED
    both("the next request", right, engine.submit(PROMPT, max_new_tokens=NEW, stop=[]).result().tokens)
    return outcome


def _stop_case(index: int) -> str:
    engine, right = served()
    stop, ids = list(_id_lists())[index]
    if stop is None:
        return ACCEPTED  # the default
    try:
        stream = engine.submit(PROMPT, max_new_tokens=NEW, stop=stop)
    except ExecutorError as error:
        expect(ids is None, f"refused: {error}")
        return refusal(" ".join(str(error).split()), "stop")
    expect(ids is not None, "accepted, and it is no list of token ids")
    end = next((i for i, token in enumerate(right) if token in ids), NEW - 1)
    both("tokens", right[: end + 1], stream.result().tokens)
    return ACCEPTED


def _length_case(prompt: list[int], new: int, served_: bool) -> str:
    """Lengths at the edges of the model and of the KV memory."""
    engine, right = served()
    try:
        result = engine.submit(prompt, max_new_tokens=new, stop=[]).result()
    except (ExecutorError, SchedulerError) as error:
        expect(not served_, f"refused: {error}")
        outcome = refusal(" ".join(str(error).split()))
    else:
        expect(served_, "accepted")
        both("length", new, len(result.tokens))
        outcome = ACCEPTED
    both("the next request", right, engine.submit(PROMPT, max_new_tokens=NEW, stop=[]).result().tokens)
    return outcome


def _text_case(text: Any, ids: list[int] | None) -> str:
    engine, _ = served()
    with Engine(engine.model, Words(), limits=LIMITS, seed=0) as own:
        try:
            stream = own.submit(text, max_new_tokens=2, stop=[])
        except ExecutorError as error:
            expect(ids is None, f"refused: {error}")
            return refusal(" ".join(str(error).split()), "prompt")
        expect(ids is not None, "accepted, and the tokenizer makes no prompt of it")
        both("prompt", ids, stream.prompt)
        result = stream.result()
        both("text", Words().decode(result.tokens).strip(), (result.text or "").strip())
    return ACCEPTED


def _engine_case(name: str, value: Any) -> str:
    """An argument of Engine: one line, or it serves the plain request."""
    engine, right = served()
    given = {"limits": LIMITS, "seed": 0, name: value}
    own = tried(lambda: Engine(engine.model, **given), (ExecutorError, SchedulerError), name.split("_")[0], "KV")
    if isinstance(own, str):
        return own
    with own:
        both("tokens", right, own.submit(PROMPT, max_new_tokens=NEW, stop=[]).result().tokens)
    return ACCEPTED


def _limits_case(name: str, value: Any) -> str:
    whole = is_whole(value) and value >= (0 if name == "urgent_blocks" else 1)
    given = {"kv_blocks": 1 << 62, name: value}
    if name == "max_seqs":
        given["max_batched_tokens"] = 1 << 62
    found = tried(lambda: Limits(**given), SchedulerError, name)
    if isinstance(found, str):
        return found
    field = next(f for f in dataclasses.fields(Limits) if f.name == name)
    expect(whole or value == field.default, "accepted, and it is not allowed")
    both(name, value, getattr(found, name))
    return ACCEPTED


def _closed_case(last: str) -> str:
    """What is called after `close`."""
    engine, _ = served()
    own = Engine(engine.model, limits=LIMITS, seed=0)
    stream = own.submit(PROMPT, max_new_tokens=200, stop=[])
    own.close()
    own.close()
    calls = {
        "submit": lambda: own.submit(PROMPT),
        "stats": own.stats,
        "result": stream.result,
        "next": lambda: [next(stream) for _ in range(300)],
        "cancel": stream.cancel,
        "enter": own.__enter__,
    }
    found = tried(calls[last], ExecutorError)
    expect(isinstance(found, str) or last in ("cancel", "enter"), f"{last} of a closed engine gave {found!r}")
    return found if isinstance(found, str) else ACCEPTED


def cases() -> Iterator[Case]:
    """All of them."""
    for name in ALLOWED:
        for number, value in enumerate(NUMBERS):
            yield Case(AREA, f"submit({name}={_told(value)}) {number}", partial(_argument_case, name, value))
    for number, value in enumerate(BIASES):
        yield Case(AREA, f"submit(logit_bias={_told(value)}) {number}", partial(_argument_case, "logit_bias", value))
    for index, (ids, _) in enumerate(_id_lists()):
        yield Case(AREA, f"submit({_told(ids)})", partial(_prompt_case, index))
        yield Case(AREA, f"submit(stop={_told(ids)})", partial(_stop_case, index))
    for prompt, new, right in (
        ([], 1, False),
        ([5], 1, True),
        ([95], 1, True),
        ([5] * 100, 100, True),
        ([5] * 252, 4, True),
        ([5] * 255, 1, True),
        ([5] * 256, 1, False),
        ([5] * 10_000, 1, False),
        ([5], 100_000, False),
        ([5] * 65, 1, True),
    ):
        yield Case(AREA, f"a prompt of {len(prompt)} and {new} tokens", partial(_length_case, prompt, new, right))
    for text, ids in (
        ("t5 t6", [5, 6]),
        ("", None),
        ("   ", None),
        ("t96", None),
        ("t-1", None),
        ("t5 " * 9, [5] * 9),
        ("word", [1]),
        ("t5\ud800", [1]),
        (b"t5", None),
    ):
        yield Case(AREA, f"submit({text!r}) with a tokenizer", partial(_text_case, text, ids))
    for name in ("policy", "limits", "kv_memory", "max_step", "seed"):
        for value in (*NUMBERS, "qllm", "QLLM", "fcfs\n", Policy, Policy(), make_policy("fcfs"), Limits):
            if not (name in ("kv_memory", "limits") and value is None):  # takes a share of the machine's memory
                yield Case(AREA, f"Engine({name}={_told(value)})", partial(_engine_case, name, value))
    for field in dataclasses.fields(Limits):
        for value in NUMBERS:
            yield Case(AREA, f"Limits({field.name}={_told(value)})", partial(_limits_case, field.name, value))
    for last in ("submit", "stats", "result", "next", "cancel", "enter"):
        yield Case(AREA, f"{last} after close", partial(_closed_case, last))


def _told(value: Any) -> str:
    text = " ".join(repr(value).split()) if not isinstance(value, int) or abs(value) < 10**40 else "10**400"
    return text if len(text) < 60 else f"{text[:57]}..."
