"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for real GPUs down to machine code."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from tests.kernels.paged_attention import interpreted
from tests.kernels.without_gpu import compile_kernels, interpret


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return interpret("tests.kernels.paged_attention.interpreted")


@pytest.mark.parametrize("check", list(interpreted.CHECKS))
def test_in_the_interpreter(results, check):
    assert results[check] is None, results[check]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    return compile_kernels("tests.kernels.paged_attention.compiled", tmp_path_factory.mktemp("triton"))


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
