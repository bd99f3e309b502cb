"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for real GPUs to machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kernels.guided_attention import Mixture, TableView, guided_kl
from tests.kernels.guided_attention import interpreted
from tests.kernels.guided_attention.world import world

ROOT = Path(__file__).parents[3]


def _run(module: str, environment: dict[str, str]) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.guided_attention.{module}"],
        cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return _run("interpreted", {**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("check", list(interpreted.CHECKS))
def test_in_the_interpreter(results, check):
    assert results[check] is None, results[check]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return _run("compiled", {**environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))})


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
