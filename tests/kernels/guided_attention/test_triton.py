"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for real GPUs to machine code."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernels.guided_attention import Mixture, TableView, guided_kl
from tests.kernels.guided_attention import interpreted
from tests.kernels.guided_attention.world import world
from tests.kernels.without_gpu import compile_kernels, interpret


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return interpret("tests.kernels.guided_attention.interpreted")


@pytest.mark.parametrize("check", list(interpreted.CHECKS))
def test_in_the_interpreter(results, check):
    assert results[check] is None, results[check]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    return compile_kernels("tests.kernels.guided_attention.compiled", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["forward", "backward_q", "backward_k"])
def test_compiles_for_a_gpu(compiled, kind, capability):
    code = compiled[f"{kind}-{capability}"]
    assert code["cubin_bytes"] > 0
    assert code["shared"] <= 64 * 1024
    assert code["tensor_cores"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_on_a_gpu(dtype, tolerance):
    w = world(batch=3, heads=3, size=512, dim=64, vocab=1000, share=0.09)
    results = []
    for backend in ("torch", "triton"):
        q, k = (x.cuda().to(dtype).requires_grad_() for x in (w.q, w.k))
        rows = type(w.rows).at(w.wanted.cuda())
        loss = guided_kl(
            q, k, rows, w.kept.cuda(), w.document.cuda(), w.ids.cuda(), TableView(w.table.table_VV.cuda(), 0.05),
            Mixture(w.wrong.cuda(), -0.5), w.scale, backend=backend,
        )  # fmt: skip
        loss.sum().backward()
        results.append((loss, q.grad, k.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)
