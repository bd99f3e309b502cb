"""The Triton kernels and the GPU's entry point in Triton's interpreter, against float64. Runs as a program of its own, because
TRITON_INTERPRET must be set before the kernels are defined; prints one JSON object {check: error or null}.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional as F

from kernels.balanced import balanced_linear, dispatch, gpu, pack, reference
from kernels.balanced.format import BalancedWeight
from kernels.balanced.gpu import arms, launch, table
from kernels.balanced.spec import VALUE_TYPES
from tests.kernels.balanced.world import randn
from tests.kernels.without_gpu import report

KERNELS = {"gather": launch.gather, "decompress": launch.decompress, "vector": launch.vector}
EPSILON = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(33, 100), (130, 37), (1, 1)]
"""(rows, columns): broken groups of rows, blocks and chunks; more than one tile."""


def close(y: torch.Tensor, x: torch.Tensor, packed: BalancedWeight, bias: torch.Tensor | None = None) -> None:
    """Within rounding of the result and of a float32 sum."""
    expected = reference.linear(x, packed, bias)
    magnitude = x.double().abs() @ packed.unpack(torch.float64).abs().T
    allowed = expected.abs() * EPSILON[y.dtype] + magnitude * packed.spec.blocks * packed.spec.k * 2**-24 + 1e-6
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= allowed).all()), (y.double() - expected).abs().max()


@contextmanager
def wide():
    """The interpreter multiplies bfloat16 matrices wrongly (it takes their bits for integers): float32 products instead."""
    with mock.patch.object(launch, "is_wide", lambda spec, dtype: dtype == torch.bfloat16 or real(spec, dtype)):
        yield


real = launch.is_wide


def gather_every_pattern_and_value_type() -> None:
    for number, (k, block) in enumerate(
        [(2, 4), (1, 5), (3, 7), (16, 16), (4, 16), (16, 32), (3, 32), (5, 100), (128, 256)]
    ):
        rows, columns = SHAPES[number % 3]
        for value_type in VALUE_TYPES:
            packed = pack(randn(rows, columns), k, block, value_type=value_type, layout="warps")
            x, bias = randn(1, columns), randn(rows)
            close(launch.gather(x, packed, bias), x, packed, bias)


def gather_every_batch_and_dtype_of_x() -> None:
    packed = pack(randn(70, 90), 3, 16, value_type="fp16", layout="warps")
    for batch in (1, 2, 3, 5, 16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = randn(batch, 90).to(dtype)
            close(launch.gather(x, packed), x, packed)


def gather_rows_that_share_a_choice() -> None:
    for vector in (2, 16, 64):
        packed = pack(randn(150, 100), 4, 16, vector=vector, layout="warps")
        x = randn(3, 100)
        close(launch.gather(x, packed), x, packed)


def decompress_every_pattern_and_value_type() -> None:
    for number, (k, block) in enumerate([(2, 4), (3, 7), (4, 16), (10, 32), (3, 32), (5, 100), (12, 256)]):
        rows, columns = SHAPES[number % 3]
        for value_type in VALUE_TYPES:
            packed = pack(randn(rows, columns), k, block, value_type=value_type, layout="warps")
            x, bias = randn(5, columns), randn(rows)
            close(launch.decompress(x, packed, bias), x, packed, bias)


def decompress_on_halves_and_in_many_tiles() -> None:
    packed = pack(randn(70, 300), 4, 16, value_type="fp16", layout="warps")
    x = randn(70, 300).half()
    close(launch.decompress(x, packed), x, packed)
    shared = pack(randn(70, 300), 4, 16, value_type="bf16", vector=16, layout="warps")
    with wide():
        close(launch.decompress(x.bfloat16(), shared), x.bfloat16(), shared)


def vector_every_number_of_rows_and_value_type() -> None:
    for vector in (16, 32, 64, 128):
        for value_type in VALUE_TYPES:
            k, block = (3, 32) if vector < 64 else (4, 16)
            packed = pack(randn(150, 90), k, block, value_type=value_type, vector=vector, layout="warps")
            x, bias = randn(20, 90), randn(150)
            close(launch.vector(x, packed, bias), x, packed, bias)


def vector_on_halves_and_in_many_tiles() -> None:
    for value_type in ("fp16", "int8"):
        packed = pack(randn(64, 520), 16, 32, value_type=value_type, vector=32, layout="warps")
        x = randn(150, 520).half()
        close(launch.vector(x, packed), x, packed)
    packed = pack(randn(100, 150), 8, 32, value_type="fp16", vector=64, layout="warps")
    x = randn(520, 150).half()
    close(launch.vector(x, packed), x, packed)


def parts_of_a_split_are_added_in_their_order() -> None:
    """Each part alone (x is zero elsewhere), added one after the other in float32, gives the very bits of the whole."""
    shapes = {"gather": (16, 32, 4, 96), "decompress": (4, 16, 20, 192), "vector": (16, 32, 20, 128)}
    for name, (k, block, batch, part) in shapes.items():
        packed = pack(randn(48, 3 * part), k, block, vector=16, layout="warps")
        x = randn(batch, 3 * part)
        whole = KERNELS[name](x, packed, None, 3)
        alone = torch.zeros(3, *x.shape)
        for number in range(3):
            alone[number, :, number * part : (number + 1) * part] = x[:, number * part : (number + 1) * part]
        by_part = [KERNELS[name](each, packed, None, 3) for each in alone]
        assert torch.equal(whole, (by_part[0] + by_part[1]) + by_part[2]), name
        assert not torch.equal(whole, KERNELS[name](x, packed, None, 1)), name  # it was split at all
        assert torch.equal(whole, KERNELS[name](x, packed, None, 3)), name
        close(whole, x, packed)


def scale_and_bias_follow_a_split() -> None:
    packed = pack(randn(40, 256), 4, 16, value_type="int8", vector=16, layout="warps")
    x, bias = randn(9, 256), randn(40)
    for kernel in KERNELS.values():
        close(kernel(x, packed, bias, 2), x, packed, bias)


def infinities_of_x_reach_exactly_the_rows_that_keep_their_column() -> None:
    for k, block, columns in ((2, 4, 30), (2, 16, 40), (3, 32, 70)):  # the last blocks are padded
        packed = pack(randn(40, columns), k, block, vector=16, layout="warps")
        for column in (0, columns - 1):
            for value in (math.inf, math.nan):
                x = torch.ones(1, columns)
                x[0, column] = value
                for kernel in (launch.gather, launch.vector):
                    assert torch.equal(kernel(x, packed).isfinite()[0], ~packed.mask()[:, column])
                # A dense tile meets infinities with its zeros, but nothing of them may come out of the padding.
                assert launch.decompress(x, packed).isfinite().logical_not().all()


def by(arm: str):
    """The GPU's path of ``balanced_linear`` on CPU tensors, with a table that always names ``arm``."""

    @contextmanager
    def patched():
        takes = lambda device, dtype: dtype in arms.X_DTYPES  # noqa: E731
        with (
            mock.patch.object(gpu, "takes", takes),
            mock.patch.object(table, "choose", return_value=arm),
        ):
            dispatch._generation += 1  # plans made before do not know of the GPU
            yield
        dispatch._generation += 1

    return patched()


def entry_point_any_layout_shape_strides_and_alignment() -> None:
    for arm in ("gather", "decompress", "vector", "dense"):
        for layout in ("rows", "warps", "lanes") if arm == "gather" else ("warps",):
            packed = pack(randn(33, 40), 3, 8, vector=16, layout=layout)
            misaligned = randn(2 * 3 * 40 + 1)[1:].view(2, 3, 40)
            strided = randn(4, 80)[:, ::2]
            with by(arm):
                for x in (misaligned, randn(40, 6).t(), strided, strided[0]):
                    close(balanced_linear(x, packed), x, packed)
                assert balanced_linear(torch.empty(3, 0, 40), packed).shape == (3, 0, 33)


def entry_point_bad_input_is_a_clear_error() -> None:
    packed, zeros = pack(randn(33, 40), 3, 8, layout="warps"), torch.zeros(2, 40)
    bad = [
        (torch.zeros(2, 39), None, "40 columns"),
        (zeros.int(), None, "must be float32"),
        (zeros.to("meta"), None, "x is on meta"),
        (zeros, torch.zeros(32), "bias must be"),
    ]
    with by("gather"):
        for x, bias, sentence in bad:
            try:
                balanced_linear(x, packed, bias)
            except ValueError as error:
                assert sentence in str(error)
            else:
                raise AssertionError(f"no error: {sentence}")


def entry_point_gradients() -> None:
    for arm in ("gather", "decompress", "vector"):
        packed = pack(randn(33, 44), 3, 8, vector=16, layout="warps")
        packed.values.requires_grad_()
        x, bias, grad = randn(2, 5, 44).requires_grad_(), randn(33).requires_grad_(), randn(2, 5, 33)
        with by(arm):
            balanced_linear(x, packed, bias).backward(grad)
        of_x, of_weight = reference.backward(x.detach(), packed, grad)
        assert torch.allclose(x.grad.double(), of_x, atol=1e-5)
        got = packed.with_tensors({**packed.tensors(), "values": packed.values.grad}).unpack()
        assert torch.allclose(got.double(), of_weight, atol=1e-5)
        assert torch.allclose(bias.grad, grad.sum((0, 1)), atol=1e-5)


def entry_point_follows_values_that_are_trained() -> None:
    packed, x = pack(randn(33, 40), 3, 8, layout="lanes"), randn(2, 40)  # converted, and converted again
    with by("gather"):
        before = balanced_linear(x, packed)
        packed.values.mul_(2)
        assert torch.allclose(balanced_linear(x, packed), 2 * before, rtol=1e-5, atol=1e-6)


def entry_point_passes_torchs_own_checks_and_compiles_to_one_graph() -> None:
    packed, bias = pack(randn(17, 24), 2, 8, layout="warps"), randn(17)
    spec = packed.spec
    fields = (spec.rows, spec.columns, spec.k, spec.block, spec.value_type, spec.index_kind, spec.vector, spec.layout)
    with by("gather"):
        arguments = (randn(3, 24).requires_grad_(), packed.values, packed.index, packed.scales, bias, *fields)
        torch.library.opcheck(torch.ops.sextant.balanced_linear.default, arguments)
        compiled = torch.compile(
            lambda x: F.relu(balanced_linear(x * 2, packed, bias)), fullgraph=True, dynamic=True, backend="aot_eager"
        )
        for batch in (2, 5):
            x = randn(batch, 24)
            assert torch.allclose(compiled(x).double(), reference.linear(x * 2, packed, bias).relu(), atol=1e-5)


CHECKS = {
    f.__name__: f
    for f in (
        gather_every_pattern_and_value_type,
        gather_every_batch_and_dtype_of_x,
        gather_rows_that_share_a_choice,
        decompress_every_pattern_and_value_type,
        decompress_on_halves_and_in_many_tiles,
        vector_every_number_of_rows_and_value_type,
        vector_on_halves_and_in_many_tiles,
        parts_of_a_split_are_added_in_their_order,
        scale_and_bias_follow_a_split,
        infinities_of_x_reach_exactly_the_rows_that_keep_their_column,
        entry_point_any_layout_shape_strides_and_alignment,
        entry_point_bad_input_is_a_clear_error,
        entry_point_gradients,
        entry_point_follows_values_that_are_trained,
        entry_point_passes_torchs_own_checks_and_compiles_to_one_graph,
    )
}


if __name__ == "__main__":
    report(CHECKS)
