"""balanced_linear: right against float64 on every instruction set, batch-invariant, differentiable, and clear about bad input."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn import functional as F

from kernels.balanced import BalancedLinear, balanced_linear, dispatch, pack, reference
from kernels.balanced.linear import sparse
from kernels.balanced.spec import VALUE_TYPES
from tests.kernels.balanced.world import PATTERNS, SHAPES, needs_cpp, randn

PORTABLE, AVX2, AVX512 = 0, 1, 2


@pytest.fixture
def isa():
    """Sets the instruction set of the kernels; the best one again afterwards."""
    yield torch.ops.sextant.balanced_set_isa
    torch.ops.sextant.balanced_set_isa(AVX512)


@pytest.fixture
def choose(monkeypatch):
    """Makes the dispatcher take one arm."""

    def force(arm):
        dispatch.reset()
        monkeypatch.setattr(dispatch, "_dense_from", lambda *_: 1 if arm == "dense" else dispatch.ALWAYS)

    yield force
    monkeypatch.undo()
    dispatch.reset()


def tolerance(x: torch.Tensor, packed) -> torch.Tensor:
    """Rounding of a float32 chain over the kept entries of a row: their number times epsilon times the sum of magnitudes."""
    magnitude = x.double().abs() @ packed.unpack(torch.float64).abs().T
    return magnitude * packed.spec.blocks * packed.spec.k * 2**-24 + 1e-12


@needs_cpp
@pytest.mark.parametrize("value_type", VALUE_TYPES)
@pytest.mark.parametrize(("k", "block"), PATTERNS)
def test_every_instruction_set_equals_float64_and_one_another(k, block, value_type, isa):
    for rows, columns in SHAPES:
        packed = pack(randn(rows, columns), k, block, value_type=value_type)
        x, bias = randn(7, columns), randn(rows)
        expected, seen = reference.linear(x, packed, bias), []
        for level in (PORTABLE, AVX2, AVX512):
            if isa(level) == level:
                y = sparse(x, packed, bias)
                assert bool(((y - expected).abs() <= tolerance(x, packed) + bias.abs() * 2**-22).all())
                seen.append(y)
        assert all(torch.equal(y, seen[0]) for y in seen)


@needs_cpp
@pytest.mark.parametrize("vector", [2, 16, 64])
@pytest.mark.parametrize("layout", ["rows", "lanes"])
def test_vector_balanced_weights_and_both_layouts(vector, layout):
    packed = pack(randn(150, 100), 4, 16, vector=vector, layout=layout)
    x = randn(3, 100)
    assert bool(((sparse(x, packed) - reference.linear(x, packed)).abs() <= tolerance(x, packed)).all())


@needs_cpp
@pytest.mark.parametrize(("k", "block"), [(16, 32), (2, 16), (3, 32), (32, 64)])
def test_a_row_has_the_same_bits_in_every_batch_and_with_every_number_of_threads(k, block):
    packed, x = pack(randn(150, 200), k, block), randn(11, 200)
    whole, threads = sparse(x, packed), torch.get_num_threads()
    assert torch.equal(whole, torch.cat([sparse(row[None], packed) for row in x]))
    try:
        torch.set_num_threads(3)
        assert torch.equal(sparse(x.repeat(30, 1), packed), whole.repeat(30, 1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("arm", ["sparse", pytest.param("dense")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_leading_shape_strides_alignment_and_float_dtype(dtype, arm, choose):
    choose(arm)
    packed = pack(randn(33, 40), 3, 8)
    flat = randn(2 * 3 * 40 + 1).to(dtype)
    misaligned = flat[1:].view(2, 3, 40)
    transposed = randn(40, 6).to(dtype).t()
    strided = randn(4, 80).to(dtype)[:, ::2]
    for x in (misaligned, transposed, strided, transposed[0]):
        y = balanced_linear(x, packed)
        assert y.dtype == dtype
        assert y.shape == (*x.shape[:-1], 33)
        epsilon = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
        assert torch.allclose(y.double(), reference.linear(x, packed), rtol=epsilon, atol=epsilon * 4)


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40)])
def test_an_empty_batch_gives_an_empty_result(shape):
    assert balanced_linear(torch.empty(shape), pack(randn(33, 40), 3, 8)).shape == (*shape[:-1], 33)


@pytest.mark.parametrize(
    ("x", "bias", "sentence"),
    [
        (torch.zeros(2, 39), None, "40 columns"),
        (torch.tensor(1.0), None, "40 columns"),
        (torch.zeros(2, 40, dtype=torch.int64), None, "must be float32"),
        (torch.zeros(2, 40, dtype=torch.complex64), None, "must be float32"),
        (torch.zeros(2, 40, device="meta"), None, "x is on meta"),
        (torch.zeros(2, 40), torch.zeros(32), "bias must be"),
        (torch.zeros(2, 40), torch.zeros(33, device="meta"), "bias must be"),
    ],
)
def test_bad_input_is_a_clear_error(x, bias, sentence):
    with pytest.raises(ValueError, match=sentence):
        balanced_linear(x, pack(randn(33, 40), 3, 8), bias)


@needs_cpp
def test_the_op_refuses_tensors_that_do_not_fit_instead_of_reading_beyond_them():
    packed = pack(randn(33, 40), 16, 32)
    spec, op = packed.spec, torch.ops.sextant.balanced_matmul
    good = [torch.zeros(1, 40), packed.values, packed.index, packed.scales, None, 33, 40, spec.tile, 0]
    assert spec.index_kind == "bitmap"
    op(*good)
    for place, wrong in [(1, packed.values[:1]), (1, packed.values.double()), (2, packed.index[:1].contiguous()), (5, 65),
                         (6, 400), (7, 16), (7, 33), (8, 1), (8, 3), (0, torch.zeros(1, 39))]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            op(*(wrong if i == place else argument for i, argument in enumerate(good)))


@needs_cpp
def test_infinities_and_nan_of_x_reach_exactly_the_rows_that_keep_their_column():
    for k, block, columns in ((2, 4, 30), (2, 16, 40), (3, 32, 70), (32, 64, 90)):  # the last blocks are padded
        packed = pack(randn(40, columns), k, block)
        for column in (0, columns - 1):
            for value in (math.inf, math.nan):
                x = torch.ones(1, columns)
                x[0, column] = value
                assert torch.equal(sparse(x, packed).isfinite()[0], ~packed.mask()[:, column])


@pytest.mark.parametrize("arm", ["sparse", "dense"])
@pytest.mark.parametrize("layout", ["rows", "lanes"])
def test_gradients_equal_float64(arm, layout, choose):
    choose(arm)
    packed = pack(randn(33, 44), 3, 8, layout=layout)
    packed.values.requires_grad_()
    x, bias = randn(2, 5, 44).requires_grad_(), randn(33).requires_grad_()
    grad = randn(2, 5, 33)
    balanced_linear(x, packed, bias).backward(grad)
    of_x, of_weight = reference.backward(x.detach(), packed, grad)
    assert torch.allclose(x.grad.double(), of_x, atol=1e-5)
    got = packed.with_tensors({**packed.tensors(), "values": packed.values.grad}).unpack()
    assert torch.allclose(got.double(), of_weight, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)


def test_the_op_passes_torchs_own_checks():
    packed = pack(randn(17, 24), 2, 8)
    packed.values.requires_grad_()
    spec = packed.spec
    fields = (spec.rows, spec.columns, spec.k, spec.block, spec.value_type, spec.index_kind, spec.vector, spec.layout)
    arguments = (randn(3, 24).requires_grad_(), packed.values, packed.index, packed.scales, randn(17), *fields)
    torch.library.opcheck(torch.ops.sextant.balanced_linear.default, arguments)


def test_one_graph_holds_the_product_and_its_gradient_in_any_batch():
    packed, bias = pack(randn(33, 40), 3, 8), randn(33)
    packed.values.requires_grad_()
    compiled = torch.compile(
        lambda x: F.relu(balanced_linear(x * 2, packed, bias)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 5):
        x = randn(batch, 40).requires_grad_()
        packed.values.grad = None
        y = compiled(x)
        assert torch.allclose(y.double(), reference.linear(x * 2, packed, bias).relu(), atol=1e-5)
        y.sum().backward()
        of_x, of_weight = reference.backward(x.detach() * 2, packed, (y > 0).double())
        assert torch.allclose(x.grad.double(), 2 * of_x, atol=1e-4)
        got = packed.with_tensors({**packed.tensors(), "values": packed.values.grad}).unpack()
        assert torch.allclose(got.double(), of_weight, atol=1e-4)


@pytest.mark.slow
@needs_cpp
def test_inductor_compiles_the_layer():
    layer = BalancedLinear(pack(randn(33, 40), 3, 8), randn(33))
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(randn(3, 40)), layer(randn(3, 40)))


def test_dense_follows_values_that_are_trained(choose):
    choose("dense")
    packed, x = pack(randn(33, 40), 3, 8), randn(2, 40)
    before = balanced_linear(x, packed)
    packed.values.mul_(2)
    assert torch.allclose(balanced_linear(x, packed), 2 * before, rtol=1e-5, atol=1e-6)
    rows = packed.to_layout("rows")
    choose("sparse")
    balanced_linear(x, rows)
    rows.values.zero_()
    assert not balanced_linear(x, rows).any()


def test_without_a_compiler_torch_runs_and_says_so_once(monkeypatch, caplog):
    from kernels import build
    from kernels.balanced import dispatch, format, lanes, selection

    def broken(name: str):
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "_library", broken)
    build.load.cache_clear()
    fresh = selection.cpp.__wrapped__
    with caplog.at_level(logging.WARNING, logger="sextant.kernels"):
        for module in (format, lanes, selection, dispatch):
            monkeypatch.setattr(module, "cpp", lambda: fresh())
        x, packed = randn(5, 70), pack(randn(20, 70), 3, 32, value_type="bf16")
        y = balanced_linear(x, packed)
    assert torch.allclose(y.double(), reference.linear(x, packed), atol=1e-5)
    assert len([record for record in caplog.records if "balanced" in record.message]) == 1
    monkeypatch.undo()
    build.load.cache_clear()
