"""The C++ path of paged attention: right against float64 SDPA, and the same bits however a token is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build
from kernels.paged_attention import paged_attention, write_kv
from tests.kernels.paged_attention.world import World

pytestmark = pytest.mark.skipif(not build.load("paged_attention"), reason="no C++ compiler")

SHAPES = [(9, 3, 64), (4, 4, 16), (8, 1, 80), (8, 2, 128), (5, 1, 64), (14, 2, 64), (7, 7, 32), (6, 3, 48)]


@pytest.fixture(autouse=True)
def _restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.ops.sextant.paged_attention_set_isa(2)


def attend(world: World, chunks, **options) -> torch.Tensor:
    return paged_attention(*world.batch(chunks), world.scale, backend="cpp", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,head_dim", SHAPES)
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_equals_float64_sdpa(heads, kv_heads, head_dim, dtype, isa):
    torch.ops.sextant.paged_attention_set_isa(isa)
    world = World([1, 16, 17, 100, 70], heads, kv_heads, head_dim, dtype)
    chunks = [(0, 0, 1), (1, 0, 16), (2, 16, 17), (3, 59, 100), (4, 69, 70)]
    torch.testing.assert_close(attend(world, chunks).double(), world.expected(chunks), atol=1e-5, rtol=1e-5)


@st.composite
def cuttings(draw):
    """Two sequences, each cut into chunks that are computed in different passes and batches."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=2, max_size=3))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))}) for n in lengths]
    return lengths, cuts, draw(st.sampled_from(SHAPES)), draw(st.sampled_from([torch.float32, torch.bfloat16]))


@given(cuttings(), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_bits_do_not_depend_on_batch_chunk_blocks_or_threads(cutting, seed):
    lengths, cuts, (heads, kv_heads, head_dim), dtype = cutting
    world = World(lengths, heads, kv_heads, head_dim, dtype, seed=seed)
    torch.set_num_threads(1)
    whole = [attend(world, [(s, 0, n)]) for s, n in enumerate(lengths)]
    torch.set_num_threads(2)
    world.permute_blocks(seed + 1)
    world.fill()
    # chunk i of every sequence in one batch, the order of the sequences turning
    for i in range(max(map(len, cuts)) - 1):
        chunks = [(s, c[i], c[i + 1]) for s, c in enumerate(cuts) if i + 1 < len(c)]
        chunks = chunks[i % len(chunks) :] + chunks[: i % len(chunks)]
        parts = attend(world, chunks).split([end - begin for _, begin, end in chunks])
        for (s, begin, end), part in zip(chunks, parts, strict=True):
            assert torch.equal(part, whole[s][begin:end])
    # every token as a decode of its own, all sequences' last tokens together
    last = attend(world, [(s, n - 1, n) for s, n in enumerate(lengths)])
    for s, out in enumerate(whole):
        assert torch.equal(last[s], out[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(9, 3, 64), (8, 1, 128), (4, 4, 16)])
@pytest.mark.parametrize("lengths", [(1500,), (1500, 700, 90)])
def test_splitting_long_sequences_over_threads_changes_no_bit(heads, kv_heads, head_dim, dtype, lengths):
    world = World(lengths, heads, kv_heads, head_dim, dtype)
    chunks = [(s, n - 1, n) for s, n in enumerate(lengths)]
    torch.set_num_threads(1)
    alone = attend(world, chunks)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(attend(world, chunks), alone)
    torch.testing.assert_close(alone.double(), world.expected(chunks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,head_dim", SHAPES)
def test_avx2_and_avx512_give_equal_bits(heads, kv_heads, head_dim, dtype):
    isa = torch.ops.sextant.paged_attention_set_isa
    if isa(2) < 2:
        pytest.skip("this CPU has no AVX-512")
    world = World([130, 40], heads, kv_heads, head_dim, dtype)
    chunks = [(0, 129, 130), (1, 3, 40)]
    wide = attend(world, chunks)
    assert isa(1) == 1
    assert torch.equal(attend(world, chunks), wide)


def test_softmax_is_accurate_over_its_whole_range():
    """One query, unit value vectors: the output is the softmax itself. Scores spread over 80 natural logarithms."""
    n = 64
    world = World([n], 1, 1, 64)
    scores = torch.linspace(-80, 3, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    world.q[0].zero_()
    world.q[0][:, 0] = 8.0  # scale is 1 / 8
    world.k[0].zero_()
    world.k[0][:, 0, 0] = scores
    world.v[0][:, 0] = torch.eye(n)
    world.fill()
    got = attend(world, [(0, n - 1, n)])[0, 0].double()
    exact = scores.double().softmax(0)
    assert ((got - exact).abs() / exact).max() < 3e-6 * 2  # a float score of -80 alone is only good to 4e-6
    near = scores > -8
    assert ((got - exact).abs() / exact)[near].max() < 6e-7


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_slots_beyond_the_context_are_never_seen(garbage, isa):
    torch.ops.sextant.paged_attention_set_isa(isa)
    chunks = [(0, 10, 19), (1, 0, 3), (2, 32, 33)]
    clean = attend(World([19, 3, 33], 9, 3, 64), chunks)
    assert torch.equal(attend(World([19, 3, 33], 9, 3, 64, garbage=garbage), chunks), clean)


def test_nan_in_a_query_stays_in_its_row():
    world = World([40, 20], 9, 3, 64)
    chunks = [(0, 30, 40), (1, 19, 20)]
    clean = attend(world, chunks)
    world.q[0][33, 4, 7] = float("nan")
    got = attend(world, chunks)
    assert got[3, 4].isnan().all()
    got[3, 4] = clean[3, 4]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_writes_the_layout_and_nothing_else(dtype):
    lengths = [40, 5, 33]
    world = World(lengths, 9, 3, 64, dtype)
    expected = world.kv.clone()
    chunks = [(0, 17, 40), (1, 0, 5), (2, 32, 33)]
    for s, begin, end in chunks:  # blank what the call must write
        for p in range(begin, end):
            block = world.kv[world.table[s, p // 16].item()]
            block[0].view(3, 64, 16)[:, :, p % 16] = -7
            block[1].view(3, 16, 64)[:, p % 16] = -7
    assert not torch.equal(world.kv, expected)
    _, kv, table, start, context = world.batch(chunks)
    fused = torch.cat([torch.cat([world.q[s], world.k[s], world.v[s]], 1)[b:e] for s, b, e in chunks])
    write_kv(fused[:, 9:12], fused[:, 12:15], kv, table, start, context, backend="cpp")
    assert torch.equal(world.kv, expected)


def test_a_sequence_without_query_tokens_and_an_empty_batch():
    world = World([20, 30], 9, 3, 64)
    chunks = [(0, 20, 20), (1, 29, 30)]
    assert torch.equal(attend(world, chunks), attend(world, [(1, 29, 30)]))
    q, kv, table, start, context = world.batch([(1, 29, 30)])
    empty = paged_attention(q[:0], kv, table[:0], start[:1], context[:0], 0.1, backend="cpp")
    assert empty.shape == (0, 9, 64)


@pytest.mark.parametrize(
    "change,error",
    [
        (lambda b: b.update(table=b["table"].clone().fill_(10_000)), IndexError),
        (lambda b: b.update(table=b["table"].clone().fill_(-1)), IndexError),
        (lambda b: b.update(table=b["table"][:, :1].contiguous()), ValueError),
        (lambda b: b.update(context=b["context"] * 100), ValueError),
        (lambda b: b.update(context=b["context"] * 0), ValueError),
        (lambda b: b.update(context=b["context"].long()), ValueError),
        (lambda b: b.update(start=b["start"] + 1), ValueError),
        (lambda b: b.update(q=b["q"].double()), ValueError),
        (lambda b: b.update(q=b["q"][:, :, :32]), ValueError),
        (lambda b: b.update(q=b["q"][:, :4].contiguous()), ValueError),
        (lambda b: b.update(kv=b["kv"].half()), TypeError),
        (lambda b: b.update(kv=b["kv"][..., :100]), ValueError),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, error):
    world = World([20, 30], 9, 3, 64)
    batch = dict(zip(("q", "kv", "table", "start", "context"), world.batch([(0, 5, 20), (1, 29, 30)]), strict=True))
    change(batch)
    with pytest.raises(error):
        paged_attention(*batch.values(), world.scale, backend="cpp")
