"""kernels.linear: right against float64 and exact integers, and the same bits for a row whatever stands around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build, linear
from kernels.linear import KINDS, reference

needs_cpp = pytest.mark.skipif(not build.load("linear"), reason="no C++ compiler: the compiled kernels cannot be built")
LEVELS = (0, 1, 2, 3)


@pytest.fixture
def level():
    """Sets the instruction set level of the kernels; the best one again afterwards."""
    yield torch.ops.sextant.linear_set_level
    torch.ops.sextant.linear_set_level(max(LEVELS))


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
    for chosen in LEVELS:
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
