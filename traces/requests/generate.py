"""Generate request traces: arrivals, lengths and classes, drawn from streams that do not disturb each other.

Every draw comes from a stream of its own, named by (seed, purpose[, class, column]). So one seed at two rates is the
same sequence of requests on a stretched time axis; changing a class's share or lengths moves no arrival and no other
class's lengths; and a longer trace begins with the shorter one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from qllm.traces.requests.arrivals import draw_arrivals
from qllm.traces.requests.lengths import draw_lengths, draw_pairs
from qllm.traces.requests.trace import SINGLE_CLASS, RequestTrace, TraceError, check_classes, check_keys

LENGTH_KEYS = ("prompt", "output", "lengths")
POISSON = {"process": "poisson"}


def generate(spec: Mapping[str, Any], *, rate: float, requests: int, seed: int) -> RequestTrace:
    """Draw `requests` requests at a mean of `rate` requests per second.

    spec = {"arrival": {"process": "poisson"} | {"process": "gamma", "cv": C}
                       | {"process": "onoff", "on_s": S, "off_s": S, "burst": B},   # arrivals.py says what they mean
            "classes": {NAME: {"share": 0.2, "prompt": LENGTH, "output": LENGTH}, ...},
            "prompt": LENGTH, "output": LENGTH}                                      # for classes that give none
    LENGTH = {"fixed": N} | {"uniform": [LOW, HIGH]} | {"lognormal": {"median" or "mean", "sigma", "min", "max"}}
             | {"quantiles": NAME_OR_PATH} | {"trace": PATH}                         # length_draws.py
    "lengths": {"trace": PATH} in place of prompt and output draws whole rows, so prompt and output stay a pair.
    "arrival" defaults to poisson; "classes" to one class "all"; one class may leave out its share: it gets the rest.

    Raises TraceError, naming the key and what is allowed.
    """
    check_keys("spec", spec, (), ("arrival", "classes", *LENGTH_KEYS))
    _check_whole("requests", requests, 1)
    _check_whole("seed", seed, 0)
    classes = spec.get("classes", {SINGLE_CLASS[0]: {}})
    if not isinstance(classes, Mapping) or not classes:
        raise TraceError(f"classes: {classes!r} must map each class to its share and lengths")
    for name, of_class in classes.items():
        check_keys(f"classes.{name}", of_class, (), ("share", *LENGTH_KEYS))
    names = check_classes(list(classes))
    shares = {name: classes[name].get("share") for name in names}
    cls = _draw_classes(shares, requests, seed)
    prompt = np.empty(requests, dtype=np.int64)
    output = np.empty(requests, dtype=np.int64)
    for i, name in enumerate(names):
        # Drawn for every request and kept where the class fits: a share moves no length.
        prompts, outputs = _draw_class_lengths(spec, name, classes[name], requests, seed)
        mine = cls == i
        prompt[mine], output[mine] = prompts[mine], outputs[mine]
    arrival = draw_arrivals(_stream(seed, "arrivals"), requests, spec.get("arrival", POISSON), rate=rate)
    return RequestTrace(arrival, prompt, output, cls, names)


def assign_classes(trace: RequestTrace, shares: Mapping[str, float | None], *, seed: int) -> RequestTrace:
    """The same requests, each of a class drawn at random: `shares` maps class to probability, in the trace's order
    of classes; they sum to 1, and one may be None: it gets the rest. Classes that the trace had are replaced."""
    _check_whole("seed", seed, 0)
    if not isinstance(shares, Mapping):
        raise TraceError(f"shares: {shares!r} must map each class to its share")
    names = check_classes(list(shares))
    return replace(trace, cls=_draw_classes(shares, len(trace), seed), classes=names)


def assign_arrivals(
    trace: RequestTrace, arrival: Mapping[str, Any] | None = None, *, rate: float, seed: int
) -> RequestTrace:
    """The same requests in the same order, arriving by the process `arrival` (as in `generate`; Poisson by default)
    at a mean of `rate` requests per second: for traces without arrivals (ShareGPT), or to replace theirs."""
    _check_whole("seed", seed, 0)
    spec = POISSON if arrival is None else arrival
    return replace(trace, arrival=draw_arrivals(_stream(seed, "arrivals"), len(trace), spec, rate=rate))


def _draw_classes(shares: Mapping[str, float | None], requests: int, seed: int) -> np.ndarray:
    """int64[requests], index into the keys of `shares`."""
    open_ended = [name for name, share in shares.items() if share is None]
    for name, share in shares.items():
        number = isinstance(share, Real) and not isinstance(share, bool)
        if share is not None and not (number and 0 <= share <= 1):
            raise TraceError(f"classes.{name}.share: {share!r} must be a number from 0 to 1")
    total = sum(share for share in shares.values() if share is not None)
    if len(open_ended) > 1 or total > 1 + 1e-9 or (not open_ended and total < 1 - 1e-9):
        given = ", ".join(f"{name} {'-' if share is None else share}" for name, share in shares.items())
        raise TraceError(f"classes: the shares ({given}) must sum to 1; at most one class may leave its share out")
    filled = [max(0.0, 1 - total) if share is None else share for share in shares.values()]
    drawn = _stream(seed, "classes").random(requests)
    return np.searchsorted(np.cumsum(filled)[:-1], drawn, side="right").astype(np.int64)


def _draw_class_lengths(
    spec: Mapping[str, Any], name: str, of_class: Mapping[str, Any], requests: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens, int64[requests] each, by the class's own keys or else the common ones."""
    where = f"classes.{name}"
    own = any(key in of_class for key in LENGTH_KEYS)
    if "lengths" in of_class or ("lengths" in spec and not own):
        for key in ("prompt", "output"):
            if key in of_class or (key in spec and "lengths" in spec):
                raise TraceError(f"{where}: has both lengths and {key}; allowed: lengths, or prompt and output")
        source = of_class if "lengths" in of_class else spec
        return draw_pairs(_stream(seed, "lengths", name), requests, source["lengths"], where=f"{where}.lengths")
    columns = []
    for key in ("prompt", "output"):
        if key not in of_class and key not in spec:
            raise TraceError(f"{where}: key {key!r} is missing; give it to the class or to all")
        length = of_class.get(key, spec.get(key))
        columns.append(draw_lengths(_stream(seed, key, name), requests, length, column=key, where=f"{where}.{key}"))
    return columns[0], columns[1]


def _stream(seed: int, *purpose: str) -> np.random.Generator:
    """The generator of one purpose: a seed sequence spawned from `seed` under the checksum of the purpose's words."""
    key = tuple(zlib.crc32(word.encode()) for word in purpose)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _check_whole(name: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < lowest:
        raise TraceError(f"{name}: {value!r} must be an integer >= {lowest}")
