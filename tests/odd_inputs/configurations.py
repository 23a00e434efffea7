# ruff: noqa: RUF024
"""Odd configurations: each key of the models with each odd value, swept and set, and odd YAML.

The right answer to a value comes from the reference of keys (`qllm config keys`): what is not allowed there must be
refused with the key's name; what is allowed is refused so, or simulated with that value and nothing else.
"""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from qllm.config.config import load_config
from qllm.config.keys import Key, config_keys
from qllm.traces.step_times.file_format import render
from qllm.traces.step_times.testing import affine_timings
from tests.odd_inputs.cases import (
    ACCEPTED,
    REFUSED,
    Case,
    both,
    command,
    expect,
    refused_by_command,
    simulated,
)

AREA = "YAML"
TIMINGS = affine_timings(layers=2, experts=4, top_k=2, hidden=64)
TIMINGS_TEXT = render(TIMINGS, list(TIMINGS.points))
TRACE_TEXT = "arrival_s,prompt_tokens,output_tokens\n0,20,3\n0.1,30,4\n0.1,10,2\n0.4,25,3\n"
BASE: dict[str, Any] = {
    "timings": "t.csv",
    "classes": {
        "ls": {"priority": 0, "share": 0.5, "prompt": {"fixed": 20}, "output": {"fixed": 3}, "slo": {"ttft": 1.0}},
        "be": {"priority": 1, "prompt": {"fixed": 30}, "output": {"fixed": 4}},
    },
    "rate": 20,
    "requests": 6,
    "limits": {"max_seqs": 4, "max_batched_tokens": 256},
    "policies": ["fcfs"],
}
#: What stands beside a key, so that only its value is odd.
BESIDE: dict[str, dict[str, Any]] = {
    "arrival.cv": {"process": "gamma"},
    "arrival.on_s": {"process": "onoff", "off_s": 1.0},
    "arrival.off_s": {"process": "onoff", "on_s": 1.0},
    "arrival.burst": {"process": "onoff", "on_s": 1.0, "off_s": 1.0},
    "arrival.process": {},
    **dict.fromkeys(("arrival.format", "arrival.unit"), {"process": "trace", "file": "r.csv"}),
    **dict.fromkeys(
        ("arrival.spread", "arrival.skip_invalid", "arrival.sessions"), {"process": "trace", "file": "r.csv"}
    ),
    "arrival.file": {"process": "trace"},
    "arrival.phases": {"process": "phases"},
    "arrival.clients": {"process": "closed"},
    "arrival.skew": {"process": "clients", "clients": 3, "cv": 1.0},
    "arrival.length_sigma": {"process": "clients", "clients": 3, "cv": 1.0},
    "arrival.folder": {"process": "servegen"},
    **dict.fromkeys(("arrival.busiest", "arrival.begin_s", "arrival.end_s"), {"process": "servegen", "folder": "pool"}),
    "arrival.turns": {"process": "conversations"},
    "arrival.think_s": {"process": "conversations", "turns": 2},
}
for _length in ("prompt", "output"):
    BESIDE |= {
        f"classes.NAME.{_length}.lognormal.{key}": {"median" if key == "median" else "mean": 20.0, "sigma": 1.0}
        for key in ("mean", "median", "sigma", "min", "max")
    }
    BESIDE |= dict.fromkeys([f"classes.NAME.{_length}.{key}" for key in ("fixed", "uniform", "quantiles", "trace")], {})
BESIDE |= dict.fromkeys(("warmup.seconds", "warmup.share", "policies.N.name", "policies.N.file"), {})

DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 0.0, 0.5, 1.0, 2.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *(1 << 53, (1 << 63) - 1, -(1 << 63), 10**30, 10**400),
    *("", " ", "3", "nan", "ls", "fcfs", "..", "../x", "/", "/dev/zero", "[red]x[/blue]", "\u202eabc", "日本語", "é"),
    *("x" * 5000, "a\nb", "\x7f", "~", "poisson", "t.csv", "r.csv", "missing.csv", "uniform"),
    *([], [1], [1, 2], [2, 1], [None], ["a", 1], {}, {"a": 1}, {"fixed": 0}, {"fixed": 5}, {1: 2}, DEEP),
    *(datetime.date(2026, 1, 2), b"\xff\x00"),
]


def files() -> None:
    """The files that the configurations name, in the working folder."""
    Path("t.csv").write_text(TIMINGS_TEXT)
    Path("r.csv").write_text(TRACE_TEXT)
    Path("pool").mkdir(exist_ok=True)
    Path("pool/chunk-0-trace.csv").write_text("0,1,1,Gamma,1,1\n600,2,1,Gamma,1,1\n")


def written(config: Any, name: str = "c.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return name


def placed(key: Key, value: Any) -> tuple[dict[str, Any], list[str | int]]:
    """A configuration with `value` at `key`, else plain, and the path of it."""
    name, _, policy = key.name.partition(" (")
    parts: list[str | int] = [{"NAME": "ls", "N": 0}.get(part, part) for part in name.split(".")]
    config = deepcopy(BASE)
    if name in BESIDE and BESIDE[name].get("process") == "trace":
        config["classes"] = {"all": {}}
        del config["rate"], config["requests"]
    if name == "duration":
        del config["requests"]
    if name.startswith("classes.NAME.lengths"):
        del config["classes"]["ls"]["prompt"], config["classes"]["ls"]["output"]
    beside = {"name": policy.rstrip(")")} if policy else deepcopy(BESIDE.get(name))
    if policy.rstrip(")") == "":
        beside = {"name": "fcfs"} if name in ("policies.N.label",) else beside
    place: Any = config
    for part in parts[:-1]:
        if isinstance(place, dict) and not isinstance(place.get(part), dict | list):
            place[part] = {}
        place = (
            place[part]
            if not isinstance(place, list) or isinstance(place[part], dict)
            else place.__setitem__(part, {}) or place[part]
        )
    if beside is not None and isinstance(place, dict):
        place.clear()
        place.update(beside)
    place[parts[-1]] = value
    return config, parts


_SIGNS: dict[str, Callable[[Any, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_SHORT = {"arrival": (str,), "prompt": (int, float, str), "output": (int, float, str), "N": (str,)}


def allowed(text: str, value: Any) -> bool:
    """Whether the words of the reference allow `value`."""
    return any(_allowed(one, value) for one in text.split(" | "))


def _allowed(text: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if text.startswith("list of "):
        return isinstance(value, list) and all(allowed(text.removeprefix("list of "), one) for one in value)
    if text.startswith(("whole number", "number")):
        whole = text.startswith("whole")
        bounds = re.findall(r"([<>]=?) ([\d.e+-]+)", text)
        return (
            number
            and not (whole and isinstance(value, float))
            and value == value
            and all(_SIGNS[sign](value, float(bound)) for sign, bound in bounds)
        )
    kinds = {"text": str, "true or false": bool, "mapping": dict, "null": type(None), "anything": object}
    return isinstance(value, kinds[text]) if text in kinds else value == text


def key_cases() -> Iterator[Case]:
    """Every key with every odd value."""
    for key in config_keys():
        for value in ODD:
            yield Case(AREA, f"{key.name}: {_told(value)}", partial(_key_case, key, value))


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:30]}... ({len(text)})"


def _key_case(key: Key, value: Any) -> str:
    files()
    config, parts = placed(key, value)
    names = [str(part) for part in parts if part != 0] + ["--any-size", "this takes more"]
    names += [f"{value}, row"] * isinstance(value, str)  # a file that holds something else
    rows = simulated(written(config), names=names)
    if isinstance(rows, str):
        return rows
    short = isinstance(value, _SHORT.get(key.name.split(".")[-1], ())) and not isinstance(value, bool)
    empty = value is None and key.default != "required"
    expect(allowed(key.allowed, value) or short or empty, f"accepted, but the reference allows: {key.allowed}")
    if value is not None and not short and not isinstance(value, dict | list) and not key.name.endswith("file"):
        found: Any = load_config("c.yaml").model_dump(by_alias=True)
        for part in parts:
            found = found[part]
        if key.name not in ("seeds", "timings", "popularity") and not key.name.endswith((".trace", ".quantiles")):
            both(key.name, float(value) if isinstance(found, float) else value, found)
    _as_asked(rows, config, key.name, value)
    return ACCEPTED


def _as_asked(rows: pd.DataFrame, config: dict[str, Any], key: str, value: Any) -> None:
    """Raise Fault unless the simulated requests are those that the configuration asks for."""
    seeds = config.get("seeds") or 1
    runs = (len(seeds) if isinstance(seeds, list) else seeds) * len(config["policies"])
    if config.get("arrival") and isinstance(config["arrival"], dict) and config["arrival"].get("process") == "trace":
        both("requests of the trace", 4, len(rows))
        both("prompt tokens", [20, 30, 10, 25], rows["prompt_tokens"].tolist())
        return
    if config.get("requests") is not None:
        both("requests", config["requests"] * runs, len(rows))
    ls = rows[rows["class"] == "ls"]
    lengths = {"prompt": ls["prompt_tokens"], "output": ls["output_tokens"]}
    for name, tokens in lengths.items():
        given = config["classes"].get("ls", {}).get(name)
        if isinstance(given, dict) and given.get("fixed") is not None and key != "arrival.length_sigma":
            both(f"{name} tokens", {given["fixed"]}, set(tokens) or {given["fixed"]})
        if isinstance(given, dict) and given.get("uniform"):
            expect(bool(tokens.between(*given["uniform"]).all()), f"{name} tokens outside {given['uniform']}")
        if isinstance(given, dict) and isinstance(given.get("lognormal"), dict):
            low, high = given["lognormal"].get("min") or 1, given["lognormal"].get("max") or 1 << 62
            expect(bool(tokens.between(low, high).all()), f"{name} tokens outside [{low}, {high}]")
    if key == "classes.NAME.share":
        expect(value not in (0, 1) or len(ls) == value * len(rows), f"{len(ls)} of {len(rows)} are ls")
    if key == "limits.kv_blocks" and value is not None:
        too_large = rows["prompt_tokens"] + rows["output_tokens"] - 1 > 16 * value
        both("rejected", too_large.tolist(), (rows["status"] == "rejected").tolist())


SWEEPS: list[tuple[str, list[Any]]] = [
    ("rate", [1, 1]),
    ("rate", [1, 1.0]),
    ("rate", [5, None]),
    ("rate", [0, 1]),
    ("rate", [math.nan, math.nan]),
    ("rate", [math.inf]),
    ("rate", []),
    ("rate", ["5", 5]),
    ("rate", [True, 1]),
    ("rate", [[1], [2]]),
    ("rate", [5, 50]),
    ("limits.kv_blocks", [None, 100]),
    ("limits.kv_blocks", [100, 0]),
    ("limits.max_seqs", [1, 2, 10**6]),
    ("limits.max_seqs", [1, 2]),
    ("limits.evict", ["offload", "recompute"]),
    ("limits.evict", ["offload", None]),
    ("limits.prefix_cache", [False, True]),
    ("limits.prefix_cache", [1]),
    ("limits", [{"max_seqs": 2}, {"max_seqs": 3}]),
    ("limits", [None, {"max_seqs": 2}]),
    ("policies.0", ["fcfs", "priority"]),
    ("policies.0", [{"name": "chunked", "budget": 16}, "fcfs"]),
    ("policies.1", ["fcfs"]),
    ("policies.x", ["fcfs"]),
    ("policies.0.budget", [16, 32]),
    ("policies", [["fcfs"], ["priority"]]),
    ("classes.ls.prompt", [10, {"uniform": [1, 5]}]),
    ("classes.ls.prompt", [10, 10.0]),
    ("classes.ls.prompt.fixed", [1, 2]),
    ("classes.ls.prompt.fixed", [0, 2]),
    ("classes.nobody.prompt.fixed", [1, 2]),
    ("classes.ls.slo.ttft", [0.1, 0.2]),
    ("classes.ls.slo", [{"ttft": 0.1}, None]),
    ("classes.ls.priority", [0, 0]),
    ("classes.ls.priority", [-(10**30), 3]),
    ("timings", ["t.csv", "t2.csv"]),
    ("timings", ["t.csv", "./t.csv"]),
    ("timings", ["t.csv", "missing.csv"]),
    ("expert_mode", ["fused", "separate"]),
    ("expert_mode", [None, "fused"]),
    ("arrival", ["poisson", {"process": "gamma", "cv": 3}]),
    ("arrival.cv", [1, 2]),
    ("arrival", [{"process": "trace", "file": "r.csv"}]),
    ("seeds", [1, 2]),
    ("name", ["a", "b"]),
    ("sweep", [1]),
    ("", [1]),
    (".", [1]),
    ("limits.", [1]),
    ("requests", [3, 6]),
    ("requests", [3, None]),
    ("duration", [1, 2]),
    ("warmup.share", [0, 0.5]),
    ("warmup", [{"share": 0.5}, {"seconds": 0.0}]),
    ("popularity", ["uniform", "uniform"]),
    ("max_step", [0.001, 1e-9]),
    ("limits.kv_blocks", list(range(1, 3)) * 2),
    ("rate", list(range(1, 200_000))),
]


def sweep_cases() -> Iterator[Case]:
    """Lists of odd values, swept."""
    for key, values in SWEEPS:
        yield Case(AREA, f"sweep: {{{key}: {_told(values)}}}", partial(_sweep_case, key, values))


def _sweep_case(key: str, values: list[Any]) -> str:
    files()
    Path("t2.csv").write_text(TIMINGS_TEXT.replace("name: affine", "name: other"))
    config = deepcopy(BASE)
    config["sweep"] = {key: values}
    rows = simulated(written(config), names=("sweep", key, "1 MiB"))
    if isinstance(rows, str):
        return rows
    try:
        distinct = len({yaml.safe_dump(value) for value in values}) == len(values)
    except yaml.YAMLError:
        distinct = True
    expect(distinct, "accepted, and a value stands twice")
    sizes = rows.groupby([key], sort=False, dropna=False, observed=True).size()
    both("points", len(values), len(sizes))
    for value, size in zip(values, sizes, strict=True):
        both(f"requests at {value}", value if key == "requests" else 6, size)
    return ACCEPTED


def set_cases() -> Iterator[Case]:
    """--set with odd assignments."""
    odd = [
        *(
            "",
            "=",
            "=1",
            "rate",
            "rate=",
            "rate =5",
            " rate=5",
            "rate=nan",
            "rate=.inf",
            "rate=1e400",
            "rate=[1,2",
            "rate==5",
        ),
        *(
            "rate=5\n",
            "rate: 5",
            "requests=3",
            "requests=3.0",
            "requests=03",
            "requests=1_0",
            "requests=0x3",
            "requests=1:30",
        ),
        *("policies=fcfs", "policies=[fcfs, fcfs]", "policies.0=priority", "policies.-1=fcfs", "policies.00=fcfs"),
        *(
            "policies.0.budget=16",
            "policies.99999999999.name=fcfs",
            "classes.ls=",
            "classes.ls=null",
            "classes=",
            "classes={}",
        ),
        *(
            "classes.ls.prompt=5",
            "classes.ls.prompt=azure_conv",
            "classes.ls.prompt.fixed.x=5",
            "classes.new.share=0.1",
        ),
        *(
            "rate=&a [*a]",
            "rate=!!python/object/apply:os.system [true]",
            "rate=<<",
            "rate=@",
            "rate=\ttab",
            "rate=5 # six",
        ),
        *("sweep.rate=5", "sweep.rate=[5]", "sweep=[5]", "sweep.=[5]", "sweep.sweep.rate=[5]", "name=../x", "name=a/b"),
        *("name=..", "name=.", "name=CON", "name=" + "n" * 300, "provenance.x=y", "unknown=1", "limits.max_seqs.x=1"),
        *("seeds=[1,1]", "seeds=[]", "seeds=0", "seeds=[-1]", "seeds=[1,2]", "seeds=1000000", "timings=", "timings=."),
    ]
    for text in odd:
        yield Case(AREA, f"--set {_told(text)}", partial(_set_case, text))


def _set_case(text: str) -> str:
    files()
    rows = simulated(written(BASE), "--set", text)
    if isinstance(rows, str):
        return rows
    key, _, value = text.partition("=")
    right = {"requests=3": 3, "requests=1_0": 10, "requests=0x3": 3, "seeds=[1,2]": 12}
    both(f"requests with {key}={value}", right.get(text, 6), len(rows))
    if text.strip() in ("rate=5", "rate =5", "rate=5 # six", "sweep.rate=[5]"):
        both("rate", {5.0}, set(rows["rate"].astype(float)))
    if text == "classes.ls.prompt=5":
        both("prompt tokens", {5}, set(rows.loc[rows["class"] == "ls", "prompt_tokens"]) or {5})
    return ACCEPTED


PLAIN = """\
timings: t.csv
classes:
  ls: {priority: 0, share: 0.5, prompt: {fixed: 20}, output: {fixed: 3}}
  be: {priority: 1, prompt: {fixed: 30}, output: {fixed: 4}}
rate: 20
requests: 6
limits: {max_seqs: 4, max_batched_tokens: 256}
policies: [fcfs]
"""
LAUGHS = "".join(f"  {b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi"))
ANCHORED = PLAIN.replace("{fixed: 20}", "&p {fixed: 20}").replace("{fixed: 30}", "{<<: *p, fixed: 30}")
SAME, WRONG = True, False
TEXTS: list[tuple[str, bytes, bool]] = [
    ("a byte order mark", b"\xef\xbb\xbf" + PLAIN.encode(), SAME),
    ("CRLF", PLAIN.replace("\n", "\r\n").encode(), SAME),
    ("CR", PLAIN.replace("\n", "\r").encode(), SAME),
    ("no line end", PLAIN.rstrip("\n").encode(), SAME),
    ("comments", b"# x\n" + PLAIN.replace("\n", " # y\n").encode(), SAME),
    ("document markers", b"---\n" + PLAIN.encode() + b"...\n", SAME),
    ("a directive", b"%YAML 1.2\n---\n" + PLAIN.encode(), SAME),
    ("an anchor", ANCHORED.encode(), SAME),
    ("an alias of a list", PLAIN.replace("[fcfs]", "&a [fcfs]").encode(), SAME),
    ("quoted keys", PLAIN.replace("rate:", '"rate":').replace("requests:", "'requests':").encode(), SAME),
    ("flow all the way", str(yaml.safe_load(PLAIN)).replace("'", '"').encode(), SAME),
    ("UTF-16", PLAIN.encode("utf-16"), WRONG),
    ("Latin-1", PLAIN.encode() + "name: é\n".encode("latin-1"), WRONG),
    ("a tab", PLAIN.replace("  ls", "\tls").encode(), WRONG),
    ("two documents", PLAIN.encode() + b"---\n" + PLAIN.encode(), WRONG),
    ("a key twice", PLAIN.encode() + b"rate: 30\n", WRONG),
    ("a class twice", PLAIN.replace("  be:", "  ls:").encode(), WRONG),
    ("a key twice in braces", PLAIN.replace("priority: 0", "priority: 0, priority: 1").encode(), WRONG),
    ("an unknown anchor", PLAIN.replace("{fixed: 20}", "*p").encode(), WRONG),
    ("an alias of itself", PLAIN.replace("{fixed: 20}", "&p {fixed: *p}").encode(), WRONG),
    ("the whole in itself", ("&all\n" + PLAIN + "provenance: *all\n").encode(), WRONG),
    ("nothing", b"", WRONG),
    ("blank lines", b"\n\n  \n", WRONG),
    ("a comment only", b"# nothing\n", WRONG),
    ("null", b"null\n", WRONG),
    ("a list", b"- 1\n- 2\n", WRONG),
    ("text", b"hello\n", WRONG),
    ("a number", b"5\n", WRONG),
    ("NUL bytes", PLAIN.encode() + b"\0\0", WRONG),
    ("a control character", PLAIN.encode() + b"name: \x01\n", WRONG),
    ("bytes of an archive", b"\x1f\x8b\x08\0" + bytes(range(256)), WRONG),
    ("a Python object", PLAIN.encode() + b"name: !!python/object:os.system {}\n", WRONG),
    ("an unknown tag", PLAIN.encode() + b"name: !x y\n", WRONG),
    ("a set", PLAIN.replace("[fcfs]", "!!set {fcfs}").encode(), WRONG),
    ("a merge of text", PLAIN.replace("{fixed: 20}", "{<<: x}").encode(), WRONG),
    ("a number as key", PLAIN.encode() + b"5: 6\n", WRONG),
    ("a list as key", PLAIN.encode() + b"[1, 2]: 6\n", WRONG),
    ("a mapping as key", PLAIN.encode() + b"? {a: 1}\n: 6\n", WRONG),
    ("null as key", PLAIN.encode() + b"~: 6\n", WRONG),
    ("true as class", PLAIN.replace("  ls:", "  yes:").encode(), WRONG),
    ("an open bracket", PLAIN.encode() + b"seeds: [1, 2\n", WRONG),
    ("an open quote", PLAIN.encode() + b'name: "x\n', WRONG),
    ("a bad indent", PLAIN.encode() + b"   name: x\n", WRONG),
    ("deep brackets", PLAIN.encode() + b"sweep: " + b"[" * 3000 + b"]" * 3000, WRONG),
    ("a billion laughs", PLAIN.encode() + b"provenance:\n  a: &a [x,x,x,x,x,x,x,x,x]\n" + LAUGHS.encode(), WRONG),
    ("two MiB", PLAIN.encode() + b"# " + b"x" * (2 << 20), WRONG),
    ("a date that is none", PLAIN.encode() + b"name: 2026-02-31\n", WRONG),
    ("octal rate", PLAIN.replace("rate: 20", "rate: 020").encode(), WRONG),
    ("sexagesimal rate", PLAIN.replace("rate: 20", "rate: 1:30").encode(), WRONG),
    ("a rate with a unit", PLAIN.replace("rate: 20", "rate: 20/s").encode(), WRONG),
    ("a decimal comma", PLAIN.replace("rate: 20", "rate: 20,5").encode(), WRONG),
    ("yes for a number", PLAIN.replace("rate: 20", "rate: yes").encode(), WRONG),
    ("shares above one", PLAIN.replace("{priority: 1,", "{priority: 1, share: 0.6,").encode(), WRONG),
    ("shares below one", PLAIN.replace("{priority: 1,", "{priority: 1, share: 0.4999,").encode(), WRONG),
    ("shares that add up", PLAIN.replace("{priority: 1,", "{priority: 1, share: 0.5,").encode(), SAME),
    ("underscores", PLAIN.replace("256", "2_56").encode(), SAME),
    ("an exponent", PLAIN.replace("rate: 20", "rate: 2e1").encode(), SAME),
    ("hexadecimal", PLAIN.replace("requests: 6", "requests: 0x6").encode(), SAME),
    ("a plus sign", PLAIN.replace("requests: 6", "requests: +6").encode(), SAME),
]  # fmt: skip


def text_cases() -> Iterator[Case]:
    """Odd texts."""
    for name, content, same in TEXTS:
        yield Case(AREA, f"a file with {name}", partial(_text_case, content, same))
    for name in (
        ".",
        "/dev/null",
        "missing.yaml",
        "c.yaml/x",
        "",
        "\0",
        "x" * 300,
        "link.yaml",
        "pipe.yaml",
        "closed.yaml",
    ):
        yield Case(AREA, f"the file {name[:20]!r}", partial(_file_case, name))


def _text_case(content: bytes, same: bool) -> str:
    files()
    Path("c.yaml").write_bytes(content)
    rows = simulated("c.yaml", names=("c.yaml", "classes"))
    if isinstance(rows, str):
        expect(not same, "refused, and it says what the plain file says")
        return rows
    expect(same, "accepted")
    Path("plain.yaml").write_text(PLAIN)
    plain = simulated("plain.yaml", out="plain")
    expect(isinstance(plain, pd.DataFrame) and plain.equals(rows), "the results differ from the plain file's")
    return ACCEPTED


def _file_case(name: str) -> str:
    import os

    files()
    written(BASE)
    Path("link.yaml").symlink_to("link.yaml")
    os.mkfifo("pipe.yaml")
    Path("closed.yaml").touch(0)
    return refused_by_command(command("simulate", name))


def cases() -> Iterator[Case]:
    """All of them."""
    yield from text_cases()
    yield from sweep_cases()
    yield from set_cases()
    yield from key_cases()


__all__ = ["REFUSED", "cases"]
