"""kernels.linear: right against float64 and exact integers, and the same bits for a row whatever stands around it."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build, linear
from kernels.linear import KINDS, reference

needs_cpp = pytest.mark.skipif(not build.load("linear"), reason="no C++ compiler: the compiled kernels cannot be built")
LEVELS = (0, 1, 2, 3)  # portable, AVX2, AVX-512, AVX-512 with its dot products
AMX, SOFT_TILES = 4, 5  # AMX where the CPU has it; the same code over tiles in plain C++, on any CPU


@pytest.fixture
def level():
    """Sets the instruction set level of the kernels; the best one again afterwards."""
    yield torch.ops.sextant.linear_set_level
    torch.ops.sextant.linear_set_level(AMX)


def oracle(x, weight, kind, bias):
    if kind == "fp32":
        return reference.linear(x, weight, bias)
    if kind == "bf16":
        return reference.linear(x.bfloat16(), weight.bfloat16(), bias)
    return reference.linear_int8(x, *reference.quantise_weight(weight), bias).double()


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 32, 4), (1, 1, 1), (5, 33, 7), (13, 96, 64), (40, 100, 130), (3, 960, 576)]
)
def test_equals_float64_or_the_exact_integer_sums(kind, m, n, k):
    generator = torch.Generator().manual_seed(m * n + k)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    y = linear.linear(x, linear.pack(weight, kind), bias)
    expected = oracle(x, weight, kind, bias)
    tolerance = 0.0 if kind == "int8" else 2e-7 * k * 3
    assert (y.double() - expected).abs().max() <= max(tolerance, 1e-6 if kind != "int8" else 0.0)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_is_right(kind, level):
    x, weight = torch.randn(17, 70), torch.randn(75, 70)
    packed, expected = linear.pack(weight, kind), oracle(x, weight, kind, None)
    for chosen in (*LEVELS, AMX, SOFT_TILES):
        level(chosen)
        assert torch.allclose(linear.linear(x, packed).double(), expected, atol=2e-5)


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_avx2_and_avx512_give_equal_bits_where_the_fingerprint_is_equal(kind, level):
    x, weight = torch.randn(9, 130), torch.randn(64, 130)
    packed, seen = linear.pack(weight, kind), {}
    for chosen in LEVELS[1:]:
        if level(chosen) != chosen:
            pytest.skip("this CPU has no AVX-512")
        y = linear.linear(x, packed)
        assert torch.equal(seen.setdefault(linear.numerics(kind), y), y)


@needs_cpp
@pytest.mark.parametrize("k", [1, 32, 33, 70, 130])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 32, 33, 70])
def test_the_amx_path_over_soft_tiles_equals_float64_and_is_batch_invariant(m, k, level):
    x, weight, bias = torch.randn(m, k), torch.randn(40, k), torch.randn(40)
    packed = linear.pack(weight, "bf16")
    level(SOFT_TILES)
    y = linear.linear(x, packed, bias)
    assert torch.allclose(y.double(), oracle(x, weight, "bf16", bias), atol=2e-5)
    assert torch.equal(y, torch.cat([linear.linear(row[None], packed, bias) for row in x]))


@needs_cpp
def test_the_fingerprint_names_what_changes_bits(level):
    level(SOFT_TILES)
    assert linear.numerics("bf16") == "bf16-amx-fma"
    level(2)
    at_most_avx512 = {kind: linear.numerics(kind) for kind in KINDS}
    level(1)
    assert {kind: linear.numerics(kind) for kind in KINDS} == at_most_avx512
    level(0)
    portable_fma = "aarch64" in platform.machine()
    assert (linear.numerics("fp32") == at_most_avx512["fp32"]) == portable_fma


@needs_cpp
@pytest.mark.parametrize(
    ("isa", "expected"), [("avx2", "bf16-fma"), ("avx512", "bf16-fma"), ("nonsense", linear.numerics("bf16"))]
)
def test_a_new_cpu_can_be_held_to_an_old_ones_bits(isa, expected):
    if "fma" not in linear.numerics("fp32"):
        pytest.skip("this CPU has no FMA")
    code = "from kernels import linear; print(linear.numerics('bf16'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SEXTANT_LINEAR_ISA": isa, "PYTHONPATH": str(build.ROOT.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
    assert ("SEXTANT_LINEAR_ISA" in done.stderr) == (isa == "nonsense")


@needs_cpp
def test_weights_lie_one_after_the_other_and_outlive_one_another():
    first, second = linear.pack(torch.ones(64, 64), "fp32"), linear.pack(torch.full((64, 64), 2.0), "fp32")
    large = linear.pack(torch.full((4096, 5000), 3.0), "fp32")  # more than one region
    assert second.data.data_ptr() == first.data.data_ptr() + first.data.nbytes
    del first
    gc.collect()
    third = linear.pack(torch.full((64, 64), 4.0), "fp32")
    for packed, value in ((second, 2.0), (third, 4.0), (large, 3.0)):
        assert (packed.unpack() == value).all()


@needs_cpp
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_has_the_same_bits_in_any_batch_position_and_thread_count(data):
    kind = data.draw(st.sampled_from(KINDS))
    m, n, k = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 130)), data.draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, packed = torch.randn(m, k, generator=generator), linear.pack(torch.randn(n, k, generator=generator), kind)
    whole = linear.linear(x, packed)
    alone = torch.cat([linear.linear(x[i : i + 1], packed) for i in range(m)])
    order = torch.randperm(m, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shuffled = linear.linear(x[order], packed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)
    assert torch.equal(whole[order], shuffled)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_loses_nothing(kind):
    weight = torch.randn(45, 39)
    unpacked = linear.pack(weight, kind).unpack()
    stored = {"fp32": weight, "bf16": weight.bfloat16(), "int8": reference.quantise_weight(weight)[0]}[kind]
    assert torch.equal(unpacked, stored)


def test_int8_weights_use_the_whole_range_and_reconstruct_within_half_a_step():
    weight = torch.randn(20, 64)
    quantised, scale = reference.quantise_weight(weight)
    assert (quantised.abs().amax(dim=1) == 127).all()
    assert ((quantised * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_a_zero_row_and_a_zero_column_stay_zero():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    x[1], weight[2] = 0.0, 0.0
    y = linear.linear(x, linear.pack(weight, "int8"))
    assert torch.equal(y[1], torch.zeros(8)) and torch.equal(y[:, 2], torch.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_path_agrees(kind, monkeypatch):
    x, weight, bias = torch.randn(6, 40), torch.randn(50, 40), torch.randn(50)
    packed = linear.pack(weight, kind)
    monkeypatch.setattr(linear, "_cpp", lambda: False)
    assert torch.allclose(linear.linear(x, packed, bias).double(), oracle(x, weight, kind, bias), atol=2e-5)
    assert linear.numerics(kind) == f"torch-{kind}"


def test_wrong_shapes_are_named():
    packed = linear.pack(torch.randn(8, 16), "fp32")
    with pytest.raises(ValueError, match="16"):
        linear.linear(torch.randn(2, 15), packed)
    with pytest.raises(ValueError, match="float matrix"):
        linear.pack(torch.zeros(3), "fp32")
    with pytest.raises(ValueError, match="dtype must be one of"):
        linear.pack(torch.randn(2, 2), "fp8")
