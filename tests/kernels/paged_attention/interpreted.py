"""The Triton kernels in Triton's interpreter, against the plain-torch path. Runs as a program of its own, because
TRITON_INTERPRET must be set before the kernels are defined; prints one JSON object {check: error or null}.
"""

from __future__ import annotations

import torch

from kernels.paged_attention import paged_attention, write_kv
from tests.kernels.paged_attention.world import World
from tests.kernels.without_gpu import report

CHUNKS = [(0, 69, 70), (1, 26, 33), (2, 0, 3)]
LENGTHS = [70, 33, 3]


def _attend(world: World, chunks, **options) -> torch.Tensor:
    return paged_attention(*world.batch(chunks), world.scale, backend="triton", **options)


def _close(world: World, got: torch.Tensor, chunks, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(got.double(), world.expected(chunks), atol=tolerance, rtol=tolerance)


def prefill_float32() -> None:
    world = World(LENGTHS, 9, 3, 64)
    _close(world, _attend(world, CHUNKS), CHUNKS)


def prefill_head_dim_that_is_no_power_of_two() -> None:
    world = World([40, 21], 8, 1, 80)
    chunks = [(0, 3, 40), (1, 20, 21)]
    _close(world, _attend(world, chunks), chunks)


def prefill_bfloat16_cache_float32_queries() -> None:
    world = World([40, 21], 6, 2, 32, torch.bfloat16)
    chunks = [(0, 30, 40), (1, 20, 21)]
    _close(world, _attend(world, chunks), chunks)


def prefill_float16() -> None:
    world = World([40, 21], 6, 2, 32, torch.float16)
    world.q = [q.half() for q in world.q]
    chunks = [(0, 30, 40), (1, 20, 21)]
    _close(world, _attend(world, chunks), chunks, 2e-3)


def decode_with_splits() -> None:
    world = World([520, 256, 257, 1], 2, 1, 16)
    chunks = [(s, n - 1, n) for s, n in enumerate(world.lengths)]
    _close(world, _attend(world, chunks, max_query_len=1), chunks)


def decode_does_not_depend_on_batch_or_bound() -> None:
    world = World([300, 20], 3, 1, 16)
    chunks = [(s, n - 1, n) for s, n in enumerate(world.lengths)]
    together = _attend(world, chunks, max_query_len=1, max_context_len=304)
    for i, chunk in enumerate(chunks):
        alone = _attend(world, [chunk], max_query_len=1)
        assert torch.equal(alone[0], together[i])


def deterministic_prefill_has_the_bits_of_decode() -> None:
    world = World([259, 20], 2, 1, 16)
    prefill = _attend(world, [(0, 254, 259), (1, 18, 20)], deterministic=True)
    for i, position in enumerate(range(254, 259)):
        assert torch.equal(_attend(world, [(0, position, position + 1)], max_query_len=1)[0], prefill[i])
    _close(world, prefill, [(0, 254, 259), (1, 18, 20)])


def garbage_in_unused_slots_is_masked() -> None:
    world, dirty = World([19, 3], 4, 2, 16), World([19, 3], 4, 2, 16, garbage=1e30)
    chunks = [(0, 10, 19), (1, 0, 3)]
    assert torch.equal(_attend(world, chunks), _attend(dirty, chunks))


def padded_batch_of_a_cuda_graph() -> None:
    """Rows and sequences behind the real ones, as a graph of a larger batch has them."""
    world = World([270, 20], 4, 2, 16)
    q, kv, table, start, context = world.batch([(0, 269, 270), (1, 19, 20)])
    exact = paged_attention(q, kv, table, start, context, world.scale, backend="triton", max_query_len=1)
    q = torch.cat([q, q[:1].expand(3, -1, -1)])
    table = torch.cat([table, torch.zeros_like(table[:1]).expand(3, -1)])
    start = torch.cat([start, start[-1:].expand(3)])
    context = torch.cat([context, torch.zeros(3, dtype=torch.int32)])
    before = kv.clone()
    k = torch.stack([world.k[0][-1], world.k[1][-1], *[torch.full((2, 16), 9.0)] * 3])
    v = torch.stack([world.v[0][-1], world.v[1][-1], *[torch.full((2, 16), 9.0)] * 3])
    write_kv(k, v, kv, table, start, context, backend="triton")
    assert torch.equal(kv, before)
    padded = paged_attention(q, kv, table, start, context, world.scale, backend="triton", max_query_len=1)
    assert torch.equal(padded[:2], exact)


def write_from_a_fused_row() -> None:
    for dtype in (torch.float32, torch.float16):
        world = World([40, 5], 4, 2, 48, dtype)
        expected = world.kv.clone()
        _, kv, table, start, context = world.batch([(0, 17, 40), (1, 0, 5)])
        for s, begin, end in [(0, 17, 40), (1, 0, 5)]:
            for p in range(begin, end):
                block = kv[table[s, p // 16].item()]
                block[0].view(2, 48, 16)[:, :, p % 16] = -7
                block[1].view(2, 16, 48)[:, p % 16] = -7
        fused = torch.cat([torch.cat([world.k[s], world.v[s]], 1)[b:e] for s, b, e in [(0, 17, 40), (1, 0, 5)]])
        write_kv(fused[:, :2], fused[:, 2:], kv, table, start, context, backend="triton")
        assert torch.equal(world.kv, expected)


CHECKS = {
    f.__name__: f
    for f in (
        prefill_float32,
        prefill_head_dim_that_is_no_power_of_two,
        prefill_bfloat16_cache_float32_queries,
        prefill_float16,
        decode_with_splits,
        decode_does_not_depend_on_batch_or_bound,
        deterministic_prefill_has_the_bits_of_decode,
        garbage_in_unused_slots_is_masked,
        padded_batch_of_a_cuda_graph,
        write_from_a_fused_row,
    )
}


if __name__ == "__main__":
    report(CHECKS)
