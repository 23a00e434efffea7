"""From measured passes to the points of a timing trace, whose sum over the steps is the whole pass.

Outside the layers, what grows with the tokens (embedding, final norm) goes to `dense_pre`, what grows with the
sequences (the batch's tables) to `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qllm.executor.calibration.grid import ALL, PassKind
from qllm.executor.calibration.stopwatch import HOST
from qllm.executor.calibration.store import Samples
from qllm.executor.errors import CalibrationError
from qllm.traces.step_times.expert_fit import ExpertFit, fit_routed
from qllm.traces.step_times.file_format import Point

LEAD = (HOST, "lead")  # of a pass: what comes before its first attention, on the host and on the device
PARABOLA_FROM = 64  # tokens between two sizes from where the curve between them counts
FORCED_WEIGHT = 0.2  # of layers whose tokens are forced onto few experts, in the fit: caching makes them too fast
SCATTER = 0.1  # an interquartile range above this share of the mean is counted
WIDE = 0.2  # an interquartile range above this share of the median is worth a warning

Measured = Mapping[PassKind, Samples]


def baselines(measured: Measured) -> dict[PassKind, Samples]:
    """The passes that were routed by the model, whole, and not right after a prompt."""
    return {kind: found for kind, found in measured.items() if kind == kind.baseline and not kind.forced_experts}


def host_seconds(measured: Measured) -> float:
    """Host time of a pass: how much longer the way to the first attention is than to the others, for one token."""
    one = measured[PassKind(1, 1, 0)]
    following = one.each("pre")
    return max(0.0, one.total(*LEAD) - (float(following.mean()) if len(following) else 0.0))


def dense_points(measured: Measured, layers: int, host_s: float, assumed: int | None = None) -> list[Point]:
    """dense_pre, dense_post and head. Passes of as many tokens are pooled whatever their context.

    `assumed`: layers of the model that the points are for, over which what lies outside of layers is shared out.
    """
    mine = baselines(measured)
    alone = {kind.new: found for kind, found in mine.items() if kind.sequences == 1 and kind.context == 0}
    lead = {tokens: found.total(*LEAD) for tokens, found in alone.items()}
    heads = _heads(mine, lead)
    points = []
    for tokens, found in sorted(alone.items()):
        pooled = [other for kind, other in mine.items() if kind.tokens == tokens]
        repeats = sum(other.repeats for other in pooled)
        pre = float(np.median([other.total("pre") for other in pooled]))
        post = float(np.median([other.total("post") for other in pooled]))
        norm = max(0.0, found.total("tail", "sample") - heads[1].seconds)
        first = lead[tokens] - host_s  # what comes before the first attention, which is more than a layer's
        layer = pre / (layers - 1) if layers > 1 else first
        pre = max(0.0, layer + (first - layer + norm) / (assumed or layers))
        spread = found.spread("lead", "pre") / layers
        points.append(Point("dense_pre", tokens, None, pre, spread, repeats))
        points.append(Point("dense_post", tokens, None, post / layers, found.spread("post") / layers, repeats))
    return points + list(heads.values())


def _heads(measured: Measured, lead: dict[int, float]) -> dict[int, Point]:
    """head by sequences, from passes of one token each; with it what their lead takes beyond one sequence's."""
    heads = {}
    for rows in sorted({kind.sequences for kind in measured if kind.new == 1}):
        found = [samples for kind, samples in measured.items() if kind.new == 1 and kind.sequences == rows]
        single = float(np.interp(rows, sorted(lead), [lead[tokens] for tokens in sorted(lead)]))
        beyond = max(0.0, float(np.median([samples.total(*LEAD) for samples in found])) - single)
        seconds = beyond + float(np.median([samples.total("tail", "sample") for samples in found]))
        spread = float(np.median([samples.spread("tail", "sample") for samples in found]))
        heads[rows] = Point("head", rows, None, seconds, spread, sum(samples.repeats for samples in found))
    return heads


def attention_points(measured: Measured, layers: int, beyond: Mapping[tuple[int, int], float]) -> list[Point]:
    """attention_prefill from passes of one sequence, attention_decode from passes of one token a sequence."""
    # Decode passes get what they take `beyond` their steps. What was not measured is filled in and marked as modelled:
    # sizes midway between those of a prompt; what a context adds to a prefill, which grows with its tokens; what it
    # adds to a decode batch, along the context.
    mine = baselines(measured)
    one = {(kind.new, kind.context): found for kind, found in mine.items() if kind.sequences == 1}
    several = {(kind.sequences, kind.context): found for kind, found in mine.items() if kind.new == 1}
    prefill = _grid("attention_prefill", one, {}, layers, along_context=False)
    return prefill + _grid("attention_decode", several, beyond, layers, along_context=True)


def beyond_steps(
    measured: Measured, dense: list[Point], fit: ExpertFit, layers: int, host_s: float
) -> dict[tuple[int, int], float]:
    """Seconds of a decode pass beyond its attention and other steps, by (sequences, context); may be < 0."""
    # The other steps are the same for all contexts, and yet they take longer after an attention over much KV, which
    # leaves them less of the processor's cache.
    curves = {
        step: np.array(sorted((p.tokens, p.seconds) for p in dense if p.step == step)).T
        for step in ("dense_pre", "dense_post", "head")
    }
    beyond = {}
    for kind, found in baselines(measured).items():
        if kind.new == 1:
            pre, post, head = (float(np.interp(kind.sequences, *curve)) for curve in curves.values())
            experts = float(fit.predicted(found.layers).sum())
            steps = host_s + layers * (pre + post) + head + experts
            beyond[kind.sequences, kind.context] = found.total() - found.total("attention") - steps
    return beyond


def longer(split: Samples, whole: Samples, part: str) -> float:
    """Seconds that a split pass takes longer than the whole one, of which only `part` is split."""
    # A split pass is never replayed. Where the whole one is, every part of the split one takes longer.
    if split.replayed == whole.replayed:
        return split.total(part) - whole.total(part)
    return split.total() - whole.total()


def query_block_seconds(measured: Measured, layers: int) -> float | None:
    """What each group of query blocks of a split attention costs beyond its share; None where none was measured."""
    # Split against whole, least squares of relative errors: the difference of two long passes says little. Where a
    # whole pass is replayed and a split one is not, that is another difference: such pairs count for want of others.
    pairs = [
        (found, whole, kind.query_blocks)
        for kind, found in measured.items()
        if kind.query_blocks > 1 and (whole := measured.get(kind.baseline)) is not None
    ]
    alike = [pair for pair in pairs if pair[0].replayed == pair[1].replayed]
    rows = [
        (blocks * layers / whole.total(), longer(split, whole, "attention") / whole.total())
        for split, whole, blocks in alike or pairs
    ]
    if not rows:
        return None
    blocks, extra = np.array(rows).T
    return max(0.0, float(blocks @ extra / (blocks @ blocks)))


def _grid(
    step: str,
    measured: Mapping[tuple[int, int], Samples],
    beyond: Mapping[tuple[int, int], float],
    layers: int,
    along_context: bool,
) -> list[Point]:
    times = {at: max(0.0, (found.total("attention") + beyond.get(at, 0.0)) / layers) for at, found in measured.items()}
    sizes, held = sorted({x for x, _ in times}), sorted({y for _, y in times})
    if not along_context:
        sizes = _with_midpoints(times, sizes)
    points = []
    for x in sizes:
        for y in held:
            if (x, y) in measured:
                found = measured[x, y]
                spread = found.spread("attention") / layers
                points.append(Point(step, x, y, times[x, y], spread, found.repeats))
                continue
            if (x, y) in times:
                seconds = times[x, y]
            elif along_context:
                known = [(c, times[x, c]) for c in held if (x, c) in times]
                seconds = _continued(known, y)
            else:
                known = [(n, times[n, y] - times[n, 0]) for n in sizes if (n, y) in times]
                seconds = times[x, 0] + max(0.0, _continued(known, x))
            points.append(Point(step, x, y, seconds, source="modelled"))
    return points


def _with_midpoints(times: dict[tuple[int, int], float], sizes: list[int]) -> list[int]:
    """`sizes` and those midway between large ones: a straight line between two sizes is too slow by some percent."""
    # Attention grows with the square of a prompt. The midpoint at context 0 (put into `times`) lies on the parabola
    # through the two and the one before them.
    more = list(sizes)
    for before, low, high in zip(sizes, sizes[1:], sizes[2:], strict=False):
        middle = (low + high) // 2
        if high - low < PARABOLA_FROM:
            continue
        xs = np.array([before, low, high], dtype=float)
        ys = [times[int(x), 0] for x in xs]
        on_curve = float(np.polyval(np.polyfit(xs, ys, 2), middle))
        times[middle, 0] = min(max(on_curve, ys[1]), ys[2])
        more.append(middle)
    return sorted(more)


def _continued(known: list[tuple[int, float]], at: int) -> float:
    """The straight line between the neighbours of `at`, or on from the last two."""
    xs, ys = [float(x) for x, _ in known], [y for _, y in known]
    if at <= xs[-1] or len(xs) == 1:
        return float(np.interp(at, xs, ys)) if len(xs) > 1 or at <= xs[-1] else ys[0] * at / max(xs[0], 1.0)
    slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return ys[-1] + slope * (at - xs[-1])


def expert_fit(measured: Measured) -> ExpertFit:
    """base and f from every measured layer whose experts ran as one group, but those right after a prompt."""
    seconds: list[float] = []
    counts: list[np.ndarray] = []
    weights: list[float] = []
    for kind, found in measured.items():
        if kind.preceding_prompt or kind.experts_per_group != ALL:
            continue
        seconds += found.each("experts").tolist()
        counts += found.layers
        weights += [FORCED_WEIGHT if kind.forced_experts else 1.0] * len(found.layers)
    if not any(rows.any() for rows in counts):
        raise CalibrationError("no pass reached an expert")
    return fit_routed(seconds, counts, weights)


def expert_points(fit: ExpertFit, share: float) -> list[Point]:
    """f as points; `share`: MoE layers among the layers, which a trace takes to be all alike."""
    return [
        Point("expert", int(tokens), None, float(seconds) * share)
        for tokens, seconds in zip(fit.tokens, fit.seconds, strict=True)
    ]


def launch_points(measured: Measured, share: float) -> list[Point]:
    """What a further group of experts with tokens costs, by tokens of the pass; `share` as in `expert_points`."""
    # The same passes split and whole.
    extra: dict[int, list[tuple[float, float, int]]] = {}
    for kind, found in measured.items():
        if kind.experts_per_group == ALL:
            continue
        firsts = np.arange(0, found.routing.shape[-1], kind.experts_per_group)
        further = np.count_nonzero(np.add.reduceat(found.routing, firsts, axis=-1)[..., 1:]) / found.repeats
        if further:
            more = longer(found, measured[kind.baseline], "experts")
            extra.setdefault(kind.tokens, []).append((more, further, found.repeats))
    points = []
    for tokens, pairs in sorted(extra.items()):
        each = max(0.0, sum(more for more, _, _ in pairs) / sum(further for _, further, _ in pairs))
        points.append(Point("launch", tokens, None, each * share, repeats=sum(repeats for _, _, repeats in pairs)))
    return points


def after_prefill_points(measured: Measured) -> list[Point]:
    """What decode passes take longer right after a prompt, by sequences."""
    points = []
    for kind, found in measured.items():
        if kind.preceding_prompt:
            longer = max(0.0, found.total() - measured[kind.baseline].total())
            points.append(Point("after_prefill", kind.sequences, None, longer, repeats=found.repeats))
    return points


def wide(measured: Measured) -> list[tuple[PassKind, float]]:
    """Passes whose interquartile range is above WIDE of their mean, widest first, with that share."""
    shares = [(kind, found.spread() / found.total()) for kind, found in measured.items()]
    return sorted((pair for pair in shares if pair[1] > WIDE), key=lambda pair: -pair[1])


def steadiness(measured: Measured) -> dict[str, int]:
    """Kinds of passes: all, those that were replayed, and those that scatter by more than SCATTER."""
    scattering = sum(found.spread() > SCATTER * found.total() for found in measured.values())
    replayed = sum(found.replayed for found in measured.values())
    return {"kinds": len(measured), "kinds_replayed": replayed, "kinds_scattering": scattering}


def fit_quality(fit: ExpertFit) -> dict[str, Any]:
    """How well the expert model holds on the layers that it was fitted to."""
    size = np.abs(fit.errors)
    return {
        "expert_fit_median_error": round(float(np.median(size)), 4),
        "expert_fit_p90_error": round(float(np.quantile(size, 0.9)), 4),
    }
