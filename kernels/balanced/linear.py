"""``balanced_linear``: the one entry point. Chooses dense or sparse by a measured table, differentiates, compiles as one op.

Eager inference goes straight to the kernel; gradients and torch.compile go through the custom op ``sextant::balanced_linear``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

from kernels.balanced import dispatch, gpu, lanes
from kernels.balanced.format import BalancedWeight, weight_of
from kernels.balanced.spec import INDEX_KINDS, BalancedSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def balanced_linear(x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., columns] times the balanced weight [rows, columns] transposed (+ ``bias`` [rows]): [..., rows] of x's dtype.

    Sums are in float32 (float64 x is computed densely in float64). Entries that are not kept do not exist: an infinity of x meets
    no zero there, unlike in a masked dense product; which of the two happens must not matter to the caller.
    Differentiable in x, in ``weight.values`` (float value types) and in ``bias``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _wants_grad(x, weight.values, bias)):
        _check(x, weight, bias)
        bias = _like(bias, x)
        spec = weight.spec
        return torch.ops.sextant.balanced_linear(
            x, weight.values, weight.index, weight.scales, bias,
            spec.rows, spec.columns, spec.k, spec.block, spec.value_type, spec.index_kind, spec.vector, spec.layout,
        )  # fmt: skip
    return _forward(x, weight, bias)


def _wants_grad(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)


def _check(x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.spec.columns:
        raise ValueError(f"x must have {weight.spec.columns} columns, got {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.device != weight.values.device:
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}")
    if bias is not None and (bias.shape != (weight.spec.rows,) or bias.device != x.device):
        raise ValueError(f"bias must be [{weight.spec.rows}] on {x.device}, got {list(bias.shape)} on {bias.device}")


def _like(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def _forward(x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    _check(x, weight, bias)
    batch = x.numel() // weight.spec.columns
    if batch == 0:
        return x.new_zeros((*x.shape[:-1], weight.spec.rows))
    plan = dispatch.plan(weight, x.dtype)
    if plan.on_gpu:
        return gpu.linear(x, weight, bias)
    if batch >= plan.dense_from:
        return F.linear(x, dense(weight, x.dtype), _like(bias, x))
    return sparse(x, weight, bias)


def dense(weight: BalancedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The unpacked weight, kept beside the packed one until its values change; in huge pages, as the packed one."""

    def make() -> torch.Tensor:
        full = weight.unpack(dtype)
        return lanes.stream_memory(full.shape, full).copy_(full)

    return weight.derive(("dense", dtype), make)


def sparse(x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product by the sparse kernel whatever the table says (``dispatch.sparse_available``). Shapes as ``balanced_linear``."""
    if gpu.takes(x.device, x.dtype):
        return gpu.linear(x, weight, bias, gpu.arms.sparse_arm(weight.spec, x.numel() // weight.spec.columns))
    if weight.spec.layout != "lanes":
        weight = weight.derive("lanes", lambda: weight.to_layout("lanes"))
    spec = weight.spec
    rows = x if x.dim() == 2 else x.reshape(-1, spec.columns)
    y = torch.ops.sextant.balanced_matmul.default(
        rows, weight.values, weight.index, weight.scales, bias,
        spec.rows, spec.columns, spec.tile, INDEX_KINDS.index(spec.index_kind),
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], spec.rows)


@lru_cache(maxsize=1024)
def _spec(
    rows: int, columns: int, k: int, block: int, value_type: str, index_kind: str, vector: int, layout: str
) -> BalancedSpec:
    return BalancedSpec(rows, columns, k, block, value_type, index_kind, vector, layout)  # type: ignore[arg-type]


@torch.library.custom_op("sextant::balanced_linear", mutates_args=())
def _op(
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
    k: int,
    block: int,
    value_type: str,
    index_kind: str,
    vector: int,
    layout: str,
) -> torch.Tensor:
    weight = weight_of(_spec(rows, columns, k, block, value_type, index_kind, vector, layout), values, index, scales)
    return _forward(x, weight, bias)


@_op.register_fake
def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    *of_spec: object,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("sextant::balanced_linear_backward", mutates_args=())
def _backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    scales: torch.Tensor,
    rows: int,
    columns: int,
    k: int,
    block: int,
    value_type: str,
    index_kind: str,
    vector: int,
    layout: str,
    of_x: bool,
    of_values: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight_of(_spec(rows, columns, k, block, value_type, index_kind, vector, layout), values, index, scales)
    grad_x = grad @ dense(weight, grad.dtype) if of_x else x.new_empty(0)
    if not of_values:
        return grad_x, x.new_empty(0)
    of_dense = grad.reshape(-1, rows).T @ x.reshape(-1, columns)
    return grad_x, weight.gather(of_dense).to(values.dtype)


@_backward_op.register_fake
def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, values: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor]:
    of_x, of_values = rest[-2:]
    return torch.empty_like(x) if of_x else x.new_empty(0), torch.empty_like(values) if of_values else x.new_empty(0)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, index, scales, bias, *ctx.spec = inputs
    ctx.save_for_backward(x, values, index, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, values, index, scales = ctx.saved_tensors
    of_x, of_values = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    grad_x = grad_values = grad_bias = None
    if of_x or of_values:
        made = torch.ops.sextant.balanced_linear_backward(
            grad.contiguous(), x, values, index, scales, *ctx.spec, of_x, of_values
        )
        grad_x, grad_values = made[0] if of_x else None, made[1] if of_values else None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, grad_values, None, None, grad_bias, *(None for _ in ctx.spec)


_op.register_autograd(_backward, setup_context=_setup)
