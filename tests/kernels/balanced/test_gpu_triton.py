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
from tests.kernels.balanced import gpu_interpreted

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.balanced.gpu_interpreted"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", list(gpu_interpreted.CHECKS))
def test_in_the_interpreter(results, check):
    assert results[check] is None, results[check]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.balanced.gpu_compiled"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loads(ptx: str, kind: str) -> list[str]:
    return [line for line in ptx.splitlines() if re.search(rf"ld\.global[\w.]*\.{kind} ", line)]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(
    "kind", ["gather", "gather-8-bit", "gather-16", "decompress", "vector", "vector-broad", "reduce"]
)
def test_compiles_for_a_gpu(compiled, kind, target):
    code = compiled[f"{kind}-{target}"]
    ptx = code["ptx"]
    assert code["cubin_bytes"] > 0
    assert code["shared"] <= 96 * 1024
    assert not re.search(r"\b(atom|red)\.", ptx)  # atomics would add in any order
    if kind in ("gather", "gather-8-bit"):
        # Of each of four chunks: 16 bytes of values, 4 or 8 of index, each in one load; only x is gathered singly.
        assert len(loads(ptx, "v4.b32")) == 4
        assert len(loads(ptx, "b32" if kind == "gather" else "v2.b32")) >= 4
        assert not loads(ptx, "b8")
        assert len(loads(ptx, "b16")) == 32
    if kind in ("decompress", "vector", "vector-broad"):
        assert "mma.sync" in ptx or "wgmma" in ptx
    if kind in ("vector", "vector-broad"):
        assert re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*0x10", ptx)
        assert not loads(ptx, "b16")
        assert ("wgmma" in ptx) == (target == 90)
