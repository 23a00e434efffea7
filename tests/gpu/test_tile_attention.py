from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu.tile_attention import TILE_ROWS, TileWork, tile_attention
from tests.gpu.paged_worlds import PagedWorld

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def attend(world, q, tiles, padding=0, **options):
    """Attend tiles (sequence, first position, last position); q and the result hold their rows one after another."""
    sizes = [last - first for _, first, last in tiles]
    rows = [sum(sizes[:i]) for i in range(len(tiles))]
    work = TileWork(
        world.blocks,
        world.ints(*rows, *[0] * padding),
        world.ints(*sizes, *[0] * padding),
        world.ints(*(first for _, first, _ in tiles), *[0] * padding),
        world.ints(*(world.first[sequence] for sequence, _, _ in tiles), *[0] * padding),
    )
    out = q.new_full((sum(sizes) + 2, world.heads, world.widths[1]), float("nan"))
    tile_attention(q, world.keys, world.values, work, out, block_size=world.block_size, **options)
    assert out[sum(sizes) :].isnan().all()  # of rows of no tile
    return out[: sum(sizes)]


def tiles_of(sequence, cuts):
    return [
        (sequence, a, min(a + TILE_ROWS, last)) for first, last in pairwise(cuts) for a in range(first, last, TILE_ROWS)
    ]


@st.composite
def cases(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    world = PagedWorld(
        [draw(st.sampled_from([1, 15, 70])), 140],
        kv_heads * group,
        kv_heads,
        draw(st.sampled_from([(8, 8), (20, 12), (12, 20)])),
        draw(st.sampled_from([1, 2, 16])),
        seed=draw(st.integers(0, 99)),
    )
    options = {
        "scale": 0.3,
        "window": draw(st.sampled_from([None, 1, 5, 70])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.sampled_from([None, world.draw(world.heads)])),
    }
    return world, options


def wanted(world, q, tiles, **options):
    positions = [(sequence, position) for sequence, *span in tiles for position in range(*span)]
    return torch.stack([world.attend(q[i], *place, **options) for i, place in enumerate(positions)])


@given(cases(), st.integers(0, 70), st.integers(1, 70))
@settings(max_examples=10, deadline=None)
def test_rows_of_tiles_are_what_plain_attention_gives_and_other_rows_stay_as_they_were(case, start, n):
    world, options = case
    tiles = [*tiles_of(0, [0, len(world.kv[0][0])]), *tiles_of(1, [start, start + n])]
    q = world.draw(sum(last - first for _, first, last in tiles), world.heads, world.widths[0])
    world.forget(1, max(0, start + 1 - (options["window"] or 1000)))
    out = attend(world, q, tiles, padding=1, **options)
    torch.testing.assert_close(out, wanted(world, q, tiles, **options), atol=2e-6, rtol=1e-5)


@given(st.lists(st.integers(1, 99), max_size=3, unique=True), st.sampled_from([None, 10]))
@settings(max_examples=5, deadline=None)
def test_a_row_does_not_depend_on_how_its_prompt_was_cut(cuts, window):
    # Its bits do not either, on a GPU: see the last test. Here NumPy multiplies, and on some processors the last bits
    # of a row of its products depend on the row's place.
    world = PagedWorld([100])
    q = world.draw(100, 2, 8)
    whole = attend(world, q, tiles_of(0, [0, 100]), scale=0.3, window=window)
    cut = attend(world, q, tiles_of(0, [0, *sorted(cuts), 100]), scale=0.3, window=window)
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)


def test_queries_may_have_any_strides_and_half_precision_is_read_and_written_as_such():
    world = PagedWorld([20], dtype=torch.float16)
    q = world.draw(20, 2, 8)
    tiles = tiles_of(0, [0, 20])
    out = attend(world, q.permute(2, 1, 0).contiguous().permute(2, 1, 0), tiles, scale=0.3)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), wanted(world, q, tiles, scale=0.3), atol=2e-3, rtol=0)


@gpu
@needs_gpu
@pytest.mark.parametrize(("widths", "group"), [((128, 128), 8), ((64, 64), 1), ((192, 128), 2), ((256, 256), 4)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_rows_are_what_plain_attention_gives_and_cuts_change_no_bits(widths, group, window, dtype):
    world = PagedWorld([300], 2 * group, 2, widths, dtype=dtype, device="cuda")
    q = world.draw(300, 2 * group, widths[0])
    options = {"scale": widths[0] ** -0.5, "window": window, "softcap": 20.0, "sinks": world.draw(2 * group)}
    whole = attend(world, q, tiles_of(0, [0, 300]), padding=3, **options)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    expected = wanted(world, q, [(0, 0, 300)], **options)
    torch.testing.assert_close(whole.float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(whole, attend(world, q, tiles_of(0, [0, 1, 77, 130, 300]), **options))
