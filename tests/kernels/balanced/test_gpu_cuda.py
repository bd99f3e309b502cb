"""The CUDA C++ kernels without a GPU: their own source run thread by thread on the CPU, and compiled by nvcc where it is."""

from __future__ import annotations

import logging
import math
import subprocess

import pytest
import torch

from kernels import build
from kernels.balanced import pack, reference
from kernels.balanced.gpu import arms, compiled
from tests.kernels.balanced.emulator import emulated
from tests.kernels.balanced.world import randn

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
EPSILON = {SINGLE: 2**-22, BRAIN: 2**-7, HALF: 2**-10}
PRODUCTS = [
    # (arm, batch, value type, dtype of x, rows, columns, k, block, vector, index)
    ("gather", 1, "fp16", HALF, 70, 200, 4, 16, 1, "4-bit"),
    ("gather", 1, "fp16", HALF, 70, 200, 16, 32, 1, "bitmap"),
    ("gather", 1, "bf16", SINGLE, 40, 330, 2, 4, 1, "bitmap"),
    ("gather", 1, "int8", BRAIN, 40, 330, 5, 8, 1, "bitmap"),
    ("gather", 1, "fp32", SINGLE, 33, 210, 3, 7, 1, "4-bit"),
    ("gather", 2, "fp16", SINGLE, 70, 600, 24, 256, 1, "8-bit"),
    ("gather", 3, "int8", BRAIN, 40, 300, 16, 64, 16, "8-bit"),
    ("decompress", 5, "fp16", HALF, 70, 200, 4, 16, 1, "4-bit"),
    ("decompress", 20, "bf16", BRAIN, 130, 304, 8, 32, 1, "8-bit"),
    ("decompress", 70, "int8", BRAIN, 70, 301, 4, 16, 16, "4-bit"),
]
CASES = [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}-{case[6]}of{case[7]}-{case[9]}") for case in PRODUCTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize(
    ("arm", "batch", "value_type", "dtype", "rows", "columns", "k", "block", "vector", "index"), CASES
)
def test_the_source_equals_float64(folder, arm, batch, value_type, dtype, rows, columns, k, block, vector, index):
    packed = pack(randn(rows, columns), k, block, value_type=value_type, vector=vector, layout="warps")
    request = arms.compiled_request(arm, packed.spec, dtype, batch)
    assert request.index == index
    loaded = emulated(request, folder)
    x, bias = randn(batch, columns).to(dtype), randn(rows)
    expected = reference.linear(x, packed, bias)
    magnitude = x.double().abs() @ packed.unpack(torch.float64).abs().T
    allowed = expected.abs() * EPSILON[dtype] + magnitude * packed.spec.blocks * k * 2**-24 + 1e-6
    seen = []
    for parts in (1, 2, 2):
        y = compiled.product(request, loaded, x, packed, bias, 132, 0, parts)
        assert bool(((y.double() - expected).abs() <= allowed).all())
        seen.append(y)
    assert torch.equal(seen[1], seen[2])
    misaligned = randn(batch * columns + 1).to(dtype)[1:].view(batch, columns)
    again = compiled.product(request, loaded, misaligned, packed, None, 132, 0)
    assert torch.equal(again, compiled.product(request, loaded, misaligned.clone(), packed, None, 132, 0))


def test_parts_of_a_split_are_added_in_their_order(folder):
    packed = pack(randn(40, 384), 16, 32, layout="warps")
    request = arms.compiled_request("gather", packed.spec, SINGLE, 1)
    loaded = emulated(request, folder)
    x = randn(1, 384)
    by_part = []
    for number in range(3):
        alone = torch.zeros_like(x)
        alone[:, number * 128 : (number + 1) * 128] = x[:, number * 128 : (number + 1) * 128]
        by_part.append(compiled.product(request, loaded, alone, packed, None, 132, 0, 3))
    whole = compiled.product(request, loaded, x, packed, None, 132, 0, 3)
    assert torch.equal(whole, (by_part[0] + by_part[1]) + by_part[2])


@pytest.mark.parametrize(("k", "block", "columns"), [(3, 32, 70), (16, 32, 70)])  # the last blocks are padded
def test_infinities_of_x_reach_exactly_the_rows_that_keep_their_column(folder, k, block, columns):
    packed = pack(randn(40, columns), k, block, layout="warps")
    loaded = emulated(request := arms.compiled_request("gather", packed.spec, SINGLE, 1), folder)
    for column in (0, columns - 1):
        for value in (math.inf, math.nan):
            x = torch.ones(1, columns)
            x[0, column] = value
            y = compiled.product(request, loaded, x, packed, None, 132, 0)
            assert torch.equal(y.isfinite()[0], ~packed.mask()[:, column])


def test_a_weight_that_is_a_misaligned_part_of_a_tensor_is_copied(folder):
    packed = pack(randn(40, 64), 16, 32, layout="warps")
    shifted = {name: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for name, t in packed.tensors().items()}
    loaded = emulated(request := arms.compiled_request("gather", packed.spec, SINGLE, 1), folder)
    x = randn(1, 64)
    expected = compiled.product(request, loaded, x, packed, None, 132, 0)
    moved = packed.with_tensors(shifted)
    assert torch.equal(compiled.product(request, loaded, x, moved, None, 132, 0), expected)
    moved.values.zero_()
    assert not compiled.product(request, loaded, x, moved, None, 132, 0).any()


@pytest.mark.parametrize("case", [PRODUCTS[1], PRODUCTS[6], PRODUCTS[9]], ids=lambda c: f"{c[0]}-{c[2]}")
def test_nvcc_compiles_the_source(case, tmp_path):
    if compiled.nvcc() is None:
        pytest.skip("no nvcc")
    arm, batch, value_type, dtype, rows, columns, k, block, vector, _ = case
    spec = pack(torch.zeros(rows, columns), k, block, value_type=value_type, vector=vector, layout="warps").spec
    request = arms.compiled_request(arm, spec, dtype, batch)
    command = compiled.command_for(request, tmp_path / "library.so", (9, 0))
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert " 0 bytes spill stores" in done.stderr
    assert not [
        line for line in done.stderr.splitlines() if "spill stores" in line and " 0 bytes spill stores" not in line
    ]


def test_what_the_cuda_kernels_lack_is_left_to_triton():
    packed = pack(randn(8, 64), 4, 16, value_type="fp16", layout="warps").spec
    assert compiled.gather_request(packed, HALF, 5) is None
    assert compiled.gather_request(packed, torch.float64, 1) is None
    assert compiled.decompress_request(packed, BRAIN, 16) is None  # float16 values do not fit into bfloat16
    assert compiled.decompress_request(packed, SINGLE, 16) is None
    assert arms.compiled_request("vector", packed, HALF, 16) is None
    odd = pack(randn(8, 512), 3, 256, value_type="fp16", layout="warps").spec
    assert compiled.decompress_request(odd, HALF, 16) is None  # whole chunks would fill 2,048 columns


@pytest.mark.parametrize("broken", ["absent", "failing"])
def test_without_a_working_nvcc_triton_runs_and_it_is_said_once(broken, tmp_path, monkeypatch, caplog):
    if broken == "failing":
        script = tmp_path / "nvcc"
        script.write_text("#!/bin/sh\necho no license >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(script))
    else:
        monkeypatch.setattr(compiled, "nvcc", lambda: None)
    monkeypatch.setenv("SEXTANT_CACHE", str(tmp_path / "cache"))
    compiled.library.cache_clear()
    compiled._warn.cache_clear()
    spec = pack(randn(8, 64), 4, 16, layout="warps").spec
    with caplog.at_level(logging.WARNING, logger="sextant.kernels"):
        for batch in (1, 2):
            assert compiled.library(compiled.gather_request(spec, SINGLE, batch), (9, 0)) is None
    said = [record.message for record in caplog.records if "Triton" in record.message]
    assert len(said) == (1 if broken == "absent" else 2)  # two sources that fail are two reasons
    assert ("no license" if broken == "failing" else "CUDA toolkit") in said[0]
    compiled.library.cache_clear()
    compiled._warn.cache_clear()
