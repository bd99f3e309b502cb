"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for real GPUs down to machine code."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from tests.kernels.balanced import gpu_interpreted
from tests.kernels.without_gpu import compile_kernels, interpret


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return interpret("tests.kernels.balanced.gpu_interpreted")


@pytest.mark.parametrize("check", list(gpu_interpreted.CHECKS))
def test_in_the_interpreter(results, check):
    assert results[check] is None, results[check]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    return compile_kernels("tests.kernels.balanced.gpu_compiled", tmp_path_factory.mktemp("triton"))


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
