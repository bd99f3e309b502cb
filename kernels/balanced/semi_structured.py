"""A balanced weight with k = 2, B = 4 as torch's 2:4 semi-structured tensor, and back: the compressed matrix and its metadata.

The metadata is CUTLASS's: four bits for every four columns (the two kept positions, the lower first), as int16 (16-bit values and
float32) or int32 (int8), its rows reordered and its 2 x 2 blocks swizzled for the tensor cores (CUTLASS host_reorder.h).
float32 knows 1:2 alone, which is a 2:4 whose two entries lie in different halves.
"""

from __future__ import annotations

import torch

from kernels.balanced.format import BalancedWeight, layout_of, pack
from kernels.balanced.spec import TORCH_DTYPES, BalancedFormatError, Layout, ValueType

VALUE_TYPES_BY_DTYPE: dict[torch.dtype, ValueType] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_semi_structured(weight: BalancedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [rows, columns / 2], metadata int16 or int32 [rows, columns / 16 or / 32]) in torch's CUTLASS layout.

    int8 gives the stored integers; their scales stay with the caller. Raises BalancedFormatError for another pattern or for a
    shape that the hardware's layout does not have (rows by 32, 16 for int8; columns by 16, 32 for int8).
    """
    spec = weight.spec
    if (spec.k, spec.block) != (2, 4):
        raise BalancedFormatError(f"a 2:4 tensor has k = 2 of every 4 columns, this weight {spec.k} of {spec.block}")
    dtype = torch.int32 if spec.value_type == "int8" else torch.int16
    quads = dtype.itemsize * 2
    if spec.rows % _group(dtype) or spec.columns % (4 * quads):
        raise BalancedFormatError(
            f"a 2:4 tensor of {spec.value_type} has rows by {_group(dtype)} and columns by {4 * quads}, "
            f"not {spec.rows} x {spec.columns}"
        )
    rows = weight.to_layout("rows")
    positions = rows.positions().repeat_interleave(spec.vector, dim=0)[: spec.rows].int()  # [rows, blocks, 2]
    values = rows.values.detach().permute(0, 3, 1, 2).reshape(-1, spec.blocks * 2)[: spec.rows].contiguous()
    if spec.value_type == "fp32":
        if bool((positions // 2 != torch.tensor([0, 1], device=positions.device)).any()):
            raise BalancedFormatError(
                "torch's float32 tensor keeps 1 of every 2 columns, this weight 2 of 4: use bf16 or fp16"
            )
        # A float32 is described as two 16-bit halves that are both kept, in the lower or the upper half of the four.
        wide = positions.reshape(spec.rows, -1) % 2 * 2
        nibbles = wide | (wide + 1) << 2
        return values, _reorder(_join(nibbles, dtype))
    nibbles = positions[..., 0] | positions[..., 1] << 2
    return values, _reorder(_join(nibbles, dtype))


def from_semi_structured(
    values: torch.Tensor, metadata: torch.Tensor, scales: torch.Tensor | None = None, layout: Layout | None = None
) -> BalancedWeight:
    """The BalancedWeight (k = 2, B = 4) of a compressed matrix and its metadata, bit for bit.

    ``scales`` [rows] (float32) belong to int8 values, ones by default. Raises BalancedFormatError for tensors that do not fit.
    """
    wanted = torch.int32 if values.dtype == torch.int8 else torch.int16
    if values.dtype not in VALUE_TYPES_BY_DTYPE or values.dim() != 2 or metadata.dtype != wanted:
        raise BalancedFormatError(
            f"no 2:4 tensor: values {values.dtype} {list(values.shape)}, metadata {metadata.dtype}"
        )
    rows, half = values.shape
    per_nibble = 1 if values.dtype == torch.float32 else 2
    quads = wanted.itemsize * 2
    if (
        tuple(metadata.shape) != (rows, half // per_nibble // quads)
        or half % (per_nibble * quads)
        or rows % _group(wanted)
    ):
        raise BalancedFormatError(f"metadata {list(metadata.shape)} does not fit values {list(values.shape)}")
    nibbles = _split(_restore(metadata))
    low, high = nibbles & 3, nibbles >> 2
    if bool((low >= high).any()):
        raise BalancedFormatError("the metadata names a column twice or out of order")
    if per_nibble == 1:
        if bool(((low % 2 != 0) | (high != low + 1)).any()):
            raise BalancedFormatError("the metadata of a float32 tensor splits a value")
        column = torch.arange(half, device=values.device) * 2 + low // 2
    else:
        quad = torch.arange(half // 2, device=values.device) * 4
        column = torch.stack((quad + low, quad + high), dim=2).view(rows, half)
    mask = torch.zeros(rows, 2 * half, dtype=torch.bool, device=values.device).scatter_(1, column.long(), True)
    # Floats of any type hold the stored bits while they are put into place; int8 goes in as exact float32 integers.
    stored = values.float() if values.dtype == torch.int8 else values
    dense = torch.zeros(rows, 2 * half, dtype=stored.dtype, device=values.device).scatter_(1, column.long(), stored)
    if values.dtype != torch.int8:
        return pack(dense, 2, 4, value_type=VALUE_TYPES_BY_DTYPE[values.dtype], mask=mask, layout=layout)
    packed = pack(dense, 2, 4, value_type="fp32", mask=mask, layout="rows")
    spec = type(packed.spec)(rows, 2 * half, 2, 4, "int8", packed.spec.index_kind)
    scales = torch.ones(rows, device=values.device) if scales is None else scales.float().contiguous()
    exact = BalancedWeight(spec, packed.values.to(torch.int8), packed.index, scales)
    return exact.to_layout(layout or layout_of(values.device))


def to_torch(weight: BalancedWeight) -> torch.Tensor:
    """torch's ``SparseSemiStructuredTensorCUTLASS`` over the weight; its products need a CUDA device, its ``to_dense`` none."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    values, metadata = to_semi_structured(weight)
    return SparseSemiStructuredTensorCUTLASS(
        torch.Size((weight.rows, weight.columns)),
        packed=values,
        meta=metadata,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def from_torch(tensor: torch.Tensor, layout: Layout | None = None) -> BalancedWeight:
    """The BalancedWeight of a ``SparseSemiStructuredTensorCUTLASS``."""
    packed, metadata = getattr(tensor, "packed", None), getattr(tensor, "meta", None)
    if not isinstance(packed, torch.Tensor) or not isinstance(metadata, torch.Tensor):
        raise BalancedFormatError("not a 2:4 tensor of torch's CUTLASS kind")
    return from_semi_structured(packed, metadata, layout=layout)


def _group(dtype: torch.dtype) -> int:
    """Rows that are reordered together."""
    return 32 if dtype == torch.int16 else 16


def _join(nibbles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[rows, quads] of four bits each, joined to metadata elements, the first lowest: [rows, quads / 4 or / 8]."""
    count = dtype.itemsize * 2
    grouped = nibbles.long().view(nibbles.shape[0], -1, count)
    joined = (grouped << (4 * torch.arange(count, device=nibbles.device))).sum(dim=2)
    return (joined - (joined >> (4 * count - 1) << (4 * count))).to(dtype)  # the top bit is the sign


def _split(metadata: torch.Tensor) -> torch.Tensor:
    """The reverse of ``_join``: [rows, quads] of 0 to 15."""
    count = metadata.dtype.itemsize * 2
    shifts = 4 * torch.arange(count, device=metadata.device)
    return ((metadata.long()[:, :, None] >> shifts) & 15).view(metadata.shape[0], -1)


def _destination(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Where element (r, c) of the metadata goes in the flat reordered one: [rows, columns].

    Within a group, rows r, r + 8, r + 16 ... come to lie together; then the off-diagonal elements of 2 x 2 blocks change places;
    then two columns are interleaved, column pairs one after the other (CUTLASS ColumnMajorInterleaved<2>).
    """
    group = _group(dtype)
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device)[None, :].expand(rows, columns)
    row = row // group * group + row % 8 * (group // 8) + row % group // 8
    upper_right = (row % 2 == 0) & (column % 2 == 1)
    lower_left = (row % 2 == 1) & (column % 2 == 0)
    step = upper_right.int() - lower_left.int()
    row, column = row + step, column - step
    return column // 2 * rows * 2 + row * 2 + column % 2


def _reorder(metadata: torch.Tensor) -> torch.Tensor:
    where = _destination(metadata.shape[0], metadata.shape[1], metadata.dtype, metadata.device)
    return torch.empty_like(metadata).view(-1).scatter_(0, where.reshape(-1), metadata.reshape(-1)).view(metadata.shape)


def _restore(reordered: torch.Tensor) -> torch.Tensor:
    where = _destination(reordered.shape[0], reordered.shape[1], reordered.dtype, reordered.device)
    return reordered.reshape(-1).gather(0, where.reshape(-1)).view(reordered.shape)
