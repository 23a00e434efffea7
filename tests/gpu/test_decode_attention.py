import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.executor.gpu.decode_attention import MERGED, SPLIT, DecodeWork, decode_attention, scratch_for
from qllm.executor.gpu.kv_write import write_kv
from tests.gpu.paged_worlds import PagedWorld

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LENGTHS = [1, 2, 17, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 40]


def decode(world, q, rows, padding=0, **options):
    """Decode the last token of each of the sequences `rows`, then as many padding rows."""
    lengths = [len(world.kv[row][0]) for row in rows]
    parts = [-(-length // SPLIT) for length in lengths]
    begins = [sum(parts[:i]) for i in range(len(parts))] + [sum(parts)] * padding
    work = DecodeWork(
        world.blocks,
        world.ints(*(world.first[row] for row in rows), *[0] * padding),
        world.ints(*lengths, *[0] * padding),
        world.ints(*begins),
        world.ints(sum(parts)),
    )
    scratch = scratch_for(sum(parts) + 1, world.heads, world.widths[1], world.device).fill_(float("nan"))
    queries = torch.cat([q[rows], q.new_full((padding, *q.shape[1:]), float("nan"))])
    out = q.new_full((len(rows) + padding, world.heads, world.widths[1]), float("nan"))
    decode_attention(
        queries, world.keys, world.values, work, out, block_size=world.block_size, scratch=scratch, **options
    )
    return out


@st.composite
def cases(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 8)]))
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4))
    world = PagedWorld(
        lengths,
        kv_heads * group,
        kv_heads,
        draw(st.sampled_from([(8, 8), (20, 12), (12, 20)])),
        draw(st.sampled_from([1, 2, 16])),
        seed=draw(st.integers(0, 99)),
    )
    options = {
        "scale": 0.3,
        "window": draw(st.sampled_from([None, 1, 5, 100, SPLIT, SPLIT + 1, 1000])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.sampled_from([None, world.draw(world.heads)])),
    }
    return world, options


@given(cases(), st.integers(0, 2))
@settings(max_examples=12, deadline=None)
def test_a_decode_row_is_what_plain_attention_gives_and_padding_is_zero(case, padding):
    world, options = case
    n = len(world.kv)
    q = world.draw(n, world.heads, world.widths[0])
    for row, (key, _) in enumerate(world.kv):
        world.forget(row, max(0, len(key) - (options["window"] or len(key))))
    out = decode(world, q, list(range(n)), padding, **options)
    for row in range(n):
        wanted = world.attend(q[row], row, len(world.kv[row][0]) - 1, **options)
        torch.testing.assert_close(out[row], wanted, atol=2e-6, rtol=1e-5)
    assert (out[n:] == 0).all()


@given(st.permutations(range(3)), st.integers(2, 3), st.sampled_from([None, 30]))
@settings(max_examples=4, deadline=None)
def test_a_rows_bits_are_the_same_alone_and_in_any_company(order, company, window):
    world = PagedWorld([SPLIT + 40, 1, 70])
    q = world.draw(3, 2, 8)
    together = decode(world, q, order[:company], padding=1, scale=0.3, window=window)
    for row, out in zip(order[:company], together, strict=False):
        assert torch.equal(out, decode(world, q, [row], scale=0.3, window=window)[0])


def test_more_parts_than_are_merged_at_a_time_and_more_rows_than_are_compared_at_a_time():
    world = PagedWorld([SPLIT * MERGED + 300] + [0] * 128, heads=1, widths=(4, 4))
    q = world.draw(129, 1, 4)
    out = decode(world, q, [*range(1, 129), 0], scale=0.5)
    wanted = world.attend(q[0], 0, SPLIT * MERGED + 299, scale=0.5)
    torch.testing.assert_close(out[-1], wanted, atol=2e-6, rtol=1e-5)
    assert (out[:-1] == 0).all()


def test_queries_and_results_may_have_any_strides():
    world = PagedWorld([30], heads=4, kv_heads=2)
    q = world.draw(1, 4, 8)
    strided = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(decode(world, strided, [0], scale=0.3), decode(world, q, [0], scale=0.3))


def test_a_group_may_have_more_heads_than_one_product_takes():
    world = PagedWorld([30], heads=2 * 17, kv_heads=2)
    q = world.draw(1, 34, 8)
    wanted = world.attend(q[0], 0, 29, scale=0.3)
    torch.testing.assert_close(decode(world, q, [0], scale=0.3)[0], wanted, atol=2e-6, rtol=1e-5)


def test_half_precision_is_read_and_written_as_such():
    world = PagedWorld([SPLIT + 5], heads=4, kv_heads=2, dtype=torch.float16)
    q = world.draw(1, 4, 8)
    out = decode(world, q, [0], scale=0.3)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out[0].float(), world.attend(q[0], 0, SPLIT + 4, scale=0.3), atol=2e-3, rtol=0)


def with_values_in_keys(world, width):
    """The same world where a value is the first `width` columns of its key, and is stored as such."""
    world.kv = [[key, key[..., :width]] for key, _ in world.kv]
    world.values, world.widths = world.keys[..., :width], (world.widths[0], width)
    return world


@given(
    st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (1, 20), (2, 2)]),
    st.sampled_from([(12, 8), (24, 20), (20, 4)]),
    st.sampled_from([None, 5, SPLIT + 1]),
)
@settings(max_examples=8, deadline=None)
def test_values_that_are_a_part_of_the_keys_are_read_once(lengths, heads, widths, window):
    kv_heads, group = heads
    world = with_values_in_keys(PagedWorld(lengths, kv_heads * group, kv_heads, widths), widths[1])
    q = world.draw(len(lengths), world.heads, widths[0])
    out = decode(world, q, list(range(len(lengths))), 1, scale=0.3, window=window)
    for row, length in enumerate(lengths):
        wanted = world.attend(q[row], row, length - 1, scale=0.3, window=window)
        torch.testing.assert_close(out[row], wanted, atol=2e-6, rtol=1e-5)
    assert (out[len(lengths) :] == 0).all()


@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([(3, 4), (40, 8)]), st.data())
@settings(max_examples=10, deadline=None)
def test_keys_and_values_are_written_to_their_slots_and_padding_nowhere(heads, rows, widths, data):
    slots = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows, unique=True))
    slots = [slot if data.draw(st.booleans()) else -1 for slot in slots]
    new = [torch.randn(heads, rows, width).transpose(0, 1) for width in widths]
    stores = [torch.full((10, heads, width), float("nan")) for width in widths]
    write_kv(*stores, torch.tensor(slots), *new)
    for store, rows_of in zip(stores, new, strict=True):
        for slot in range(10):
            wanted = rows_of[slots.index(slot)] if slot in slots else torch.full_like(store[0], float("nan"))
            torch.testing.assert_close(store[slot], wanted, atol=0, rtol=0, equal_nan=True)


@gpu
@needs_gpu
@pytest.mark.parametrize(("widths", "group"), [((128, 128), 8), ((64, 64), 1), ((192, 128), 16), ((80, 80), 4)])
@pytest.mark.parametrize("window", [None, 300])
def test_on_a_gpu_decode_rows_are_what_plain_attention_gives_with_the_same_bits_alone(widths, group, window):
    lengths = [1, 255, 256, 257, 1000, 5000]
    world = PagedWorld(lengths, 4 * group, 4, widths, dtype=torch.bfloat16, device="cuda")
    q = world.draw(len(lengths), 4 * group, widths[0])
    options = {"scale": widths[0] ** -0.5, "window": window, "softcap": 20.0, "sinks": world.draw(4 * group)}
    out = decode(world, q, list(range(len(lengths))), padding=2, **options)
    assert (out[len(lengths) :] == 0).all()
    for row, length in enumerate(lengths):
        wanted = world.attend(q[row], row, length - 1, **options)
        torch.testing.assert_close(out[row].float(), wanted, atol=2e-2, rtol=2e-2)
        assert torch.equal(out[row], decode(world, q, [row], **options)[0])


@gpu
@needs_gpu
@pytest.mark.parametrize("heads", [16, 20, 128])
def test_on_a_gpu_latents_are_attended_as_plain_attention_does(heads):
    lengths = [1, 255, 256, 257, 1000, 5000]
    world = with_values_in_keys(PagedWorld(lengths, heads, 1, (576, 512), dtype=torch.bfloat16, device="cuda"), 512)
    q = world.draw(len(lengths), heads, 576)
    out = decode(world, q, list(range(len(lengths))), padding=2, scale=576**-0.5)
    assert (out[len(lengths) :] == 0).all()
    for row, length in enumerate(lengths):
        wanted = world.attend(q[row], row, length - 1, scale=576**-0.5)
        torch.testing.assert_close(out[row].float(), wanted, atol=2e-2, rtol=2e-2)
        assert torch.equal(out[row], decode(world, q, [row], scale=576**-0.5)[0])
