"""Generate request traces: arrivals, lengths and classes, drawn from streams that do not disturb each other.

Every draw comes from a stream of its own, named by (seed, purpose[, class, column]). So one seed at two rates is the
same sequence of requests on a stretched time axis; changing a class's share or lengths moves no arrival and no other
class's lengths; and a longer trace begins with the shorter one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from qllm.traces.requests.arrivals import draw_arrivals
from qllm.traces.requests.lengths import draw_lengths, draw_pairs
from qllm.traces.requests.trace import RequestTrace, TraceError

MOST_REQUESTS = 10**9  # of a generated trace: 40 GB

if TYPE_CHECKING:  # pydantic is loaded with the first recipe
    from qllm.traces.requests.clients.pool import Drawn
    from qllm.traces.requests.recipe import GeneratedArrival, Recipe


def generate(recipe: Recipe | Mapping[str, Any], *, rate: float, requests: int, seed: int) -> RequestTrace:
    """Draw a request trace.

    A recipe as a mapping, which may hold models of `recipe` too:

        {"arrival": {"process": "poisson"} | {"process": "gamma", "cv": C}
                    | {"process": "onoff", "on_s": S, "off_s": S, "burst": B}
                    | {"process": "clients", "clients": N, "cv": C, "skew": S, "length_sigma": S}
                    | {"process": "servegen", "folder": PATH, "busiest": N, "begin_s": S, "end_s": S},
         "classes": {NAME: {"share": 0.2, "prompt": LENGTH, "output": LENGTH}, ...},
         "prompt": LENGTH, "output": LENGTH}                              # for classes that give none
        LENGTH = {"fixed": N} | {"uniform": [LOW, HIGH]}
                 | {"lognormal": {"median" or "mean": N, "sigma": S, "min": N, "max": N}}
                 | {"quantiles": NAME_OR_PATH} | {"trace": PATH}

    `"lengths": {"trace": PATH}` in place of prompt and output draws whole rows, so the two stay a pair. By default
    arrivals are Poisson and there is one class, "all". One class may leave out its share: it gets the rest. The clients
    of a pool are the tenants of their requests; a folder of ServeGen's has their lengths too, for classes without any.

    Args:
        recipe: How requests arrive, in which classes, and how long they are.
        rate: Mean of requests per second.
        requests: How many to draw.
        seed: Of everything that is drawn.

    Raises:
        TraceError: One line names the key and what is allowed.
    """
    from qllm.traces.requests.recipe import check_recipe

    recipe = check_recipe(recipe)
    _check_whole("requests", requests, 1, MOST_REQUESTS)
    _check_whole("seed", seed, 0)
    names = tuple(recipe.classes)
    cls = _draw_classes({name: recipe.classes[name].share for name in names}, requests, seed)
    prompt = np.empty(requests, dtype=np.int64)
    output = np.empty(requests, dtype=np.int64)
    own_lengths = any(recipe.lengths_of(name) is None for name in names)
    arrival, drawn = _draw_arrivals(recipe.arrival, requests, rate=rate, seed=seed, lengths=own_lengths)
    for i, name in enumerate(names):
        # Drawn for every request and kept where the class fits: a share moves no length.
        prompts, outputs = _draw_class_lengths(recipe, name, requests, seed, drawn)
        if drawn:
            prompts, outputs = drawn.stretched(prompts, 0), drawn.stretched(outputs, 1)
        mine = cls == i
        prompt[mine], output[mine] = prompts[mine], outputs[mine]
    return RequestTrace(arrival, prompt, output, cls, names, tenants=drawn.tenants if drawn else None)


def assign_classes(trace: RequestTrace, shares: Mapping[str, float | None], *, seed: int) -> RequestTrace:
    """The same requests, each of a class drawn at random; classes that the trace had are replaced.

    Args:
        trace: The requests.
        shares: Class -> probability, in the trace's order of classes. They sum to 1; one may be None: it gets the rest.
        seed: Of the draw.

    Raises:
        TraceError: The shares or the names of the classes are wrong.
    """
    _check_whole("seed", seed, 0)
    from qllm.traces.requests.recipe import check_shares

    shares = check_shares(shares)
    return replace(trace, cls=_draw_classes(shares, len(trace), seed), classes=tuple(shares))


def assign_arrivals(
    trace: RequestTrace, arrival: GeneratedArrival | Mapping[str, Any] | None = None, *, rate: float, seed: int
) -> RequestTrace:
    """The same requests in the same order with new arrivals: for traces without any (ShareGPT), or to replace them.

    Arrivals of a pool of clients bring new tenants, and leave the lengths as they are.

    Args:
        trace: The requests.
        arrival: The process, as in `generate`; Poisson by default.
        rate: Mean of requests per second.
        seed: Of the draw.

    Raises:
        TraceError: The process or its settings are wrong.
    """
    _check_whole("seed", seed, 0)
    from qllm.traces.requests.recipe import check_arrival

    process = check_arrival({"process": "poisson"} if arrival is None else arrival)
    if getattr(process, "length_sigma", 0):
        raise TraceError("arrival.length_sigma: requests that are there have lengths of their own; leave it out")
    arrivals, drawn = _draw_arrivals(process, len(trace), rate=rate, seed=seed, lengths=False)
    return replace(trace, arrival=arrivals, tenants=drawn.tenants if drawn else trace.tenants)


def _draw_arrivals(
    process: GeneratedArrival, requests: int, *, rate: float, seed: int, lengths: bool
) -> tuple[np.ndarray, Drawn | None]:
    """Arrivals in seconds, float64[requests], and of a pool of clients whose they are; `lengths`: with lengths."""
    if process.process not in ("clients", "servegen"):
        return draw_arrivals(_stream(seed, "arrivals"), requests, process, rate=rate), None
    from qllm.traces.requests.clients.draw import draw_requests

    drawn = draw_requests(process, partial(_stream, seed), requests, rate=rate, lengths=lengths)
    return drawn.arrival, drawn


def _draw_classes(shares: Mapping[str, float | None], requests: int, seed: int) -> np.ndarray:
    """int64[requests], index into the keys of `shares`."""
    total = sum(share for share in shares.values() if share is not None)
    filled = [max(0.0, 1 - total) if share is None else share for share in shares.values()]
    drawn = _stream(seed, "classes").random(requests)
    return np.searchsorted(np.cumsum(filled)[:-1], drawn, side="right").astype(np.int64)


def _draw_class_lengths(
    recipe: Recipe, name: str, requests: int, seed: int, drawn: Drawn | None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens of a class, int64[requests] each."""
    source = recipe.lengths_of(name)
    key = "lengths"
    if source is None:
        assert drawn is not None  # only a folder's clients have lengths
        return drawn.lengths(_stream(seed, "prompt", name), 0), drawn.lengths(_stream(seed, "output", name), 1)
    try:
        if not isinstance(source, tuple):
            return draw_pairs(_stream(seed, key, name), requests, source)
        columns = []
        for key, length in zip(("prompt", "output"), source, strict=True):
            columns.append(draw_lengths(_stream(seed, key, name), requests, length, column=key))
        return columns[0], columns[1]
    except TraceError as error:
        raise TraceError(f"classes.{name}.{key}.{error}") from None


def _stream(seed: int, *purpose: str) -> np.random.Generator:
    """The generator of one purpose: a seed sequence spawned from `seed` under the checksum of the purpose's words."""
    key = tuple(zlib.crc32(word.encode()) for word in purpose)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _check_whole(name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):
        most = "" if highest is None else f" and <= {highest}"
        raise TraceError(f"{name}: {value!r:.80} must be an integer >= {lowest}{most}")
