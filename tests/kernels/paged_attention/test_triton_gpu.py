"""The Triton kernels on a GPU (skipped without one): every dtype, tensor cores included, and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from kernels.paged_attention import paged_attention, write_kv
from tests.kernels.paged_attention.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
pytest.importorskip("triton")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def on_gpu(world: World, chunks) -> list[torch.Tensor]:
    return [x.cuda() for x in world.batch(chunks)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(9, 3, 64), (32, 8, 128), (8, 1, 80), (4, 4, 16)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_prefill_and_decode(heads, kv_heads, head_dim, dtype, deterministic):
    world = World([600, 33, 300], heads, kv_heads, head_dim, dtype)
    world.q = [q.to(dtype) for q in world.q]
    for chunks, longest in (([(0, 599, 600), (1, 2, 33), (2, 100, 300)], None), ([(0, 599, 600), (1, 32, 33)], 1)):
        got = paged_attention(
            *on_gpu(world, chunks), world.scale, max_query_len=longest, deterministic=deterministic, backend="triton"
        )
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.double().cpu(), world.expected(chunks), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_prefill_has_the_bits_of_decode(dtype):
    world = World([600, 33], 32, 8, 128, dtype)
    world.q = [q.to(dtype) for q in world.q]
    prefill = paged_attention(
        *on_gpu(world, [(0, 500, 600), (1, 0, 33)]), world.scale, deterministic=True, backend="triton"
    )
    decode = paged_attention(
        *on_gpu(world, [(1, 32, 33), (0, 599, 600)]), world.scale, max_query_len=1, backend="triton"
    )
    assert torch.equal(prefill[99], decode[1])
    assert torch.equal(prefill[-1], decode[0])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_write_kv_rounds_as_torch_does(dtype):
    world = World([40, 5], 9, 3, 64, dtype)
    _, kv, table, start, context = on_gpu(world, [(0, 0, 40), (1, 0, 5)])
    kv.zero_()
    write_kv(torch.cat(world.k).cuda(), torch.cat(world.v).cuda(), kv, table, start, context, backend="triton")
    used = [int(b) for s, n in enumerate(world.lengths) for b in world.table[s, : -(-n // 16)]]
    assert torch.equal(kv.cpu()[used], world.kv[used])


def test_decode_in_a_cuda_graph_follows_its_inputs():
    world = World([600, 300], 9, 3, 64)
    q, kv, table, start, context = on_gpu(world, [(0, 499, 500), (1, 99, 100)])

    def run() -> torch.Tensor:
        return paged_attention(q, kv, table, start, context, world.scale, max_query_len=1, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for chunks in ([(0, 599, 600), (1, 299, 300)], [(0, 9, 10), (1, 256, 257)]):
        fresh = on_gpu(world, chunks)
        q.copy_(fresh[0])
        context.copy_(fresh[4])
        graph.replay()
        torch.testing.assert_close(out.double().cpu(), world.expected(chunks), atol=3e-6, rtol=3e-6)
