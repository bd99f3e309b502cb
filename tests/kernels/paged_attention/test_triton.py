"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for real GPUs down to machine code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.kernels.paged_attention import interpreted

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.paged_attention.interpreted"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", list(interpreted.CHECKS))
def test_in_the_interpreter(results, check):
    assert results[check] is None, results[check]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.paged_attention.compiled"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kind", ["decode", "prefill", "reduce", "write"])
def test_compiles_for_a_gpu(compiled, kind, target):
    code = compiled[f"{kind}-{target}"]
    assert code["cubin_bytes"] > 0
    assert code["shared"] <= 64 * 1024
    if kind in ("decode", "prefill"):
        # K and V must come in vectors of 16 bytes, and the products run on the tensor cores
        assert re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*0x10", code["ptx"])
        assert not re.search(r"ld\.global\.(b16|u16)", code["ptx"])
        assert "mma.sync" in code["ptx"] or "wgmma" in code["ptx"]
