"""kernels.decoder: the compiled stack gives the bits of the composed ops, in any batch, chunking, block order, thread count."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from kernels import build, elementwise
from kernels.decoder import Decoder, DecoderSpec, LayerWeights, reference
from kernels.linear import KINDS, pack

pytestmark = pytest.mark.skipif(
    not build.load("decoder"), reason="no C++ compiler: the compiled kernels cannot be built"
)
SPEC = DecoderSpec(hidden=96, layers=2, heads=6, kv_heads=2, head_dim=16, ffn=160, vocab=200)
BLOCKS = 64


def make(kind="fp32", spec=SPEC, bias=False, qk_norm=False):
    generator = torch.Generator().manual_seed(0)

    def matrix(n, k):
        return pack(torch.randn(n, k, generator=generator) / k**0.5, kind)

    def norm(n):
        return torch.rand(n, generator=generator) + 0.5

    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    layers = [
        LayerWeights(
            norm(spec.hidden),
            matrix(width, spec.hidden),
            matrix(spec.hidden, spec.heads * spec.head_dim),
            norm(spec.hidden),
            matrix(2 * spec.ffn, spec.hidden),
            matrix(spec.hidden, spec.ffn),
            torch.randn(width, generator=generator) if bias else None,
            norm(spec.head_dim) if qk_norm else None,
            norm(spec.head_dim) if qk_norm else None,
        )
        for _ in range(spec.layers)
    ]
    table = elementwise.rope_table(1 / 1e4 ** (torch.arange(0, spec.head_dim, 2) / spec.head_dim), 512)
    embedding = torch.randn(spec.vocab, spec.hidden, generator=generator)
    return Decoder(spec, embedding, layers, norm(spec.hidden), matrix(spec.vocab, spec.hidden), table)


def new_kv(dtype=torch.float32):
    return torch.zeros(BLOCKS, SPEC.layers, 2, SPEC.kv_heads, SPEC.head_dim * 16, dtype=dtype)


def batch_of(pieces):
    """pieces: (tokens, number already in the cache, block ids) of each sequence; logits of every token."""
    starts, ids, positions, contexts = [0], [], [], []
    for tokens, cached, _ in pieces:
        ids += tokens
        positions += range(cached, cached + len(tokens))
        starts.append(len(ids))
        contexts.append(cached + len(tokens))
    table = torch.zeros(len(pieces), max(len(blocks) for *_, blocks in pieces), dtype=torch.int32)
    for row, (*_, blocks) in zip(table, pieces, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    as_int32 = [torch.tensor(values, dtype=torch.int32) for values in (positions, starts, contexts)]
    return torch.tensor(ids), as_int32[0], as_int32[1], as_int32[2], table, torch.arange(len(ids))


def prompt(seed, length):
    return torch.randint(0, SPEC.vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bias", "qk_norm", "interleaved"), [(False, False, False), (True, True, True)])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_equals_the_composed_ops_bit_for_bit(kind, bias, qk_norm, interleaved, kv_dtype):
    spec = DecoderSpec(**{**SPEC.__dict__, "rope_interleaved": interleaved})
    decoder, ours, theirs = make(kind, spec, bias, qk_norm), new_kv(kv_dtype), new_kv(kv_dtype)
    batch = batch_of([(prompt(1, 37), 0, [5, 9, 2]), (prompt(2, 1), 0, [30]), (prompt(3, 16), 0, [7, 8])])
    assert torch.equal(decoder.forward(ours, *batch), reference.forward(decoder, theirs, *batch))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_has_the_same_logits_alone_in_a_batch_chunked_and_on_two_threads(kind):
    decoder, tokens = make(kind), prompt(4, 70)
    alone = decoder.forward(new_kv(), *batch_of([(tokens, 0, [0, 1, 2, 3, 4])]))
    kv, rows = new_kv(), []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        blocks, cached = [40, 3, 17, 60, 21], 0
        for number, size in enumerate((1, 20, 16, 30, 1, 2)):
            others = [(prompt(50 + number * 9 + i, 3 + i), 0, [6 + i]) for i in range(number)]
            pieces = [*others, (tokens[cached : cached + size], cached, blocks)]
            rows.append(decoder.forward(kv, *batch_of(pieces))[-size:])
            cached += size
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, torch.cat(rows))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_more_threads_than_cores_and_long_contexts_change_no_bit(kv_dtype):
    """On several threads long items of attention are cut and the team's threads come late: neither may show."""
    decoder, tokens = make("bf16"), prompt(7, 500)
    batch = batch_of([(tokens[-1:], 499, list(range(32))), (tokens[:3], 0, [40])])
    prefill = batch_of([(tokens[:499], 0, list(range(32)))])
    threads, logits = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            kv = new_kv(kv_dtype)
            logits.append([decoder.forward(kv, *prefill), *(decoder.forward(kv, *batch) for _ in range(4)), kv])
    finally:
        torch.set_num_threads(threads)
    for other in logits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits[0], other, strict=True))
    assert torch.equal(logits[0][1], reference.forward(decoder, new_kv(kv_dtype).copy_(logits[0][-1]), *batch))


def test_the_stack_is_close_to_float64():
    """Independent of every kernel here: plain float64 attention over one whole sequence, without a cache."""
    decoder, tokens, s = make("fp32"), prompt(8, 45), SPEC
    got = decoder.forward(new_kv(), *batch_of([(tokens, 0, [3, 1, 2])])).double()
    positions = torch.arange(len(tokens))

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + s.rms_eps).sqrt() * weight.double()

    def turn(x):
        cosine, sine = decoder.rope_table[positions].double()[:, None].unbind(2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

    x = decoder.embedding[torch.tensor(tokens)].double()
    for layer in decoder.layers:
        qkv = norm(x, layer.attention_norm) @ layer.qkv.unpack().double().T
        q, k, v = (
            part.unflatten(1, (-1, s.head_dim))
            for part in qkv.split([s.heads * s.head_dim, *[s.kv_heads * s.head_dim] * 2], 1)
        )
        q, k = turn(q), turn(k)
        k, v = (part.repeat_interleave(s.heads // s.kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / s.head_dim**0.5
        scores = scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ layer.out.unpack().double().T
        gate, up = (norm(x, layer.ffn_norm) @ layer.gate_up.unpack().double().T).chunk(2, 1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer.down.unpack().double().T
    expected = norm(x, decoder.final_norm) @ decoder.lm_head.unpack().double().T
    assert (got - expected).abs().max() < 2e-4


def test_an_empty_batch_and_a_batch_without_logits():
    decoder = make()
    none = torch.zeros(0, dtype=torch.int64)
    tokens, positions, start, context, table, _ = batch_of([(prompt(1, 20), 0, [0, 1])])
    kv = new_kv()
    assert decoder.forward(kv, tokens, positions, start, context, table, none).shape == (0, SPEC.vocab)
    assert kv[0].any()
    empty = torch.zeros(0, dtype=torch.int32)
    assert decoder.forward(kv, none, empty, torch.zeros(1, dtype=torch.int32), empty, table[:0], none).numel() == 0


def test_only_the_wanted_rows_are_computed():
    decoder = make()
    batch = batch_of([(prompt(1, 20), 0, [0, 1]), (prompt(2, 9), 0, [2])])
    every = decoder.forward(new_kv(), *batch)
    some = decoder.forward(new_kv(), *batch[:-1], torch.tensor([3, 19, 28]))
    assert torch.equal(some, every[[3, 19, 28]])


def test_a_step_releases_pythons_lock():
    decoder, kv, batch = (
        make(),
        new_kv(),
        batch_of([(prompt(i, 100), 0, list(range(i * 7, i * 7 + 7))) for i in range(8)]),
    )
    ticks, done = [], threading.Event()

    def count():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    windows = []
    for _ in range(5):
        start = time.monotonic()
        decoder.forward(kv, *batch)
        windows.append((start, time.monotonic()))
    done.set()
    counter.join()
    assert any(start < tick < end for tick in ticks for start, end in windows)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda b: (b[0] + 1000, *b[1:]), IndexError),
        (lambda b: (*b[:4], b[4] + BLOCKS, b[5]), IndexError),
        (lambda b: (*b[:5], b[5] + 100), IndexError),
        (lambda b: (b[0], b[1] + 1, *b[2:]), ValueError),
        (lambda b: (*b[:3], b[3] + 600, *b[4:]), ValueError),
        (lambda b: (b[0].int(), *b[1:]), TypeError),
    ],
)
def test_a_batch_that_would_read_or_write_wildly_is_refused(change, error):
    decoder, batch = make(), batch_of([(prompt(1, 20), 0, [0, 1])])
    with pytest.raises(error):
        decoder.forward(new_kv(), *change(batch))


def test_weights_that_do_not_fit_are_refused():
    decoder = make()
    with pytest.raises(ValueError, match="layers"):
        Decoder(SPEC, decoder.embedding, decoder.layers[:1], decoder.final_norm, decoder.lm_head, decoder.rope_table)
    with pytest.raises(ValueError):
        Decoder(
            SPEC, decoder.embedding[:, :50], decoder.layers, decoder.final_norm, decoder.lm_head, decoder.rope_table
        )
