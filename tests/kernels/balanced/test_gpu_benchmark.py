"""The GPU's benchmark without a GPU, and its yardstick of errors."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import balanced_kernels_gpu as benchmark
from kernels.balanced import pack, reference
from tests.kernels.balanced.world import randn


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["balanced_kernels_gpu", "--out", str(tmp_path)])
    assert benchmark.main() == 0
    assert "needs a CUDA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", list(benchmark.EPSILON))
def test_a_wrong_entry_is_an_error_and_rounding_is_none(dtype):
    packed, x = pack(randn(40, 64), 4, 16), randn(3, 64).to(dtype)
    y = reference.linear(x, packed).to(dtype)
    assert benchmark.error_ratio(y, x, packed) < 1
    y[1, 7] += 0.25 * y.abs().max()
    assert benchmark.error_ratio(y, x, packed) > 1


def test_bytes_are_those_that_the_kernel_streams():
    packed = pack(randn(64, 128), 16, 32, value_type="fp16", layout="warps")
    kernels = [benchmark.Kernel("gather", True), benchmark.Kernel("gather"), benchmark.Kernel("decompress", True)]
    values = 64 * 128 // 2 * 2
    assert [benchmark.streamed_bytes(packed, kernel) - values for kernel in kernels] == [
        64 * 128 // 8,
        64 * 64,
        64 * 64,
    ]
