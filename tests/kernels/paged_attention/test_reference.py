"""The plain-torch path against SDPA in float64, and the entry point's choice of a path."""

from __future__ import annotations

import pytest
import torch

from kernels import build, paged_attention
from kernels.paged_attention import reference
from tests.kernels.paged_attention.world import World


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(9, 3, 64), (4, 4, 16), (8, 1, 80)])
def test_reference_equals_sdpa(heads, kv_heads, head_dim, dtype):
    world = World([1, 50, 33], heads, kv_heads, head_dim, dtype)
    chunks = [(0, 0, 1), (1, 20, 50), (2, 32, 33)]
    expected = world.expected(chunks)
    wide = reference.paged_attention(*world.batch(chunks), world.scale)
    torch.testing.assert_close(wide.double(), expected, atol=1e-6, rtol=1e-6)
    plain = paged_attention.paged_attention(*world.batch(chunks), world.scale, backend="torch")
    torch.testing.assert_close(plain.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_writes_the_layout(dtype):
    world = World([40, 5], 4, 2, 32, dtype)
    expected = world.kv.clone()
    world.kv.zero_()
    _, kv, table, start, context = world.batch([(0, 0, 40), (1, 0, 5)])
    k, v = torch.cat(world.k), torch.cat(world.v)
    paged_attention.write_kv(k, v, kv, table, start, context, backend="torch")
    assert torch.equal(world.kv, expected)


def test_the_cpu_uses_cpp_if_it_is_there():
    assert paged_attention.backend_for(torch.device("cpu")) == ("cpp" if build.load("paged_attention") else "torch")


def test_asking_for_cpp_without_a_compiler_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(paged_attention, "_cpp", lambda: False)
    world = World([5], 4, 2, 32)
    with pytest.raises(RuntimeError, match="compiler"):
        paged_attention.paged_attention(*world.batch([(0, 4, 5)]), world.scale, backend="cpp")
    out = paged_attention.paged_attention(*world.batch([(0, 4, 5)]), world.scale)
    torch.testing.assert_close(out.double(), world.expected([(0, 4, 5)]), atol=1e-5, rtol=1e-5)
