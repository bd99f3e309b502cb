"""The ``lanes`` layout of the CPU kernels, to and from the ``rows`` layout: 16 rows side by side, so that a register holds them.

A tile is one block, or several small ones, of at most 32 columns where a bitmap describes it (one int32 a row) and of at most 16
where 4-bit entries do. values [rows / 16, tiles, j, 16] and index: bitmap int32 [rows / 16, tiles, 16]; 8-bit uint8
[rows / 16, tiles * j, 16]; 4-bit uint8 [rows / 16, ceil(tiles * j / 2), 16] with two consecutive j in a byte, low half first.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels.balanced.selection import cpp
from kernels.balanced.spec import INDEX_KINDS, LANES, BalancedFormatError, BalancedSpec

HUGE_FROM = 1 << 20
"""Bytes from which a tensor is put into huge pages (of 2 MiB, shared by small weights)."""


def values_from_rows(values: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """values [groups, blocks, k, vector] of the ``rows`` layout in the ``lanes`` layout ``spec``."""
    by_row = values.permute(0, 3, 1, 2).reshape(-1, spec.blocks * spec.k)[: spec.rows]
    missing = (spec.tiles * spec.merge - spec.blocks) * spec.k
    return _interleave(F.pad(by_row, (0, missing, 0, -spec.rows % LANES)), spec)


def _interleave(by_row: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """[16 n rows, tiles * j] with the 16 rows of a group side by side: [n, tiles, j, 16]."""
    return by_row.view(-1, LANES, spec.tiles, spec.merge * spec.k).permute(0, 2, 3, 1).contiguous()


def stream_memory(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Memory for what a product streams once: on the CPU in huge pages, which a core reads several per cent faster."""
    nbytes = shape.numel() * like.element_size()
    if like.device.type != "cpu" or nbytes < HUGE_FROM or not cpp():
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.ops.sextant.balanced_memory(nbytes).view(like.dtype).view(shape)


def _in_tile(positions: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """Positions within blocks [groups, blocks, k] as positions within tiles, one row each: uint8 [16 n rows, tiles * j].

    Entries that only fill a tile or a group up have the value zero and name columns beyond the last one, where the kernel's copy
    of x holds zeros: a zero times an infinity of x would be NaN. Rows beyond the last one repeat it; nobody reads their result.
    """
    missing = spec.tiles * spec.merge - spec.blocks
    if missing:
        first = torch.arange(spec.k, dtype=torch.uint8, device=positions.device)
        positions = torch.cat((positions, first.expand(spec.groups, missing, spec.k)), dim=1)
    if spec.merge > 1:
        number = torch.arange(positions.shape[1], device=positions.device)
        positions = positions + number.remainder(spec.merge).mul(spec.block).to(torch.uint8)[None, :, None]
    by_group = positions.reshape(spec.groups, -1)
    if spec.vector == 1 and spec.rows % LANES == 0:
        return by_group
    row = torch.arange(spec.lane_groups * LANES, device=positions.device).clamp(max=spec.rows - 1)
    return by_group[row // spec.vector]


def from_rows(values: torch.Tensor, positions: torch.Tensor, spec: BalancedSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, index) of the ``lanes`` layout ``spec`` from the values of the ``rows`` layout and decoded positions."""
    if values.device.type == "cpu" and cpp():
        out = stream_memory(torch.Size(spec.values_shape), values)
        out_index = stream_memory(torch.Size(spec.index_shape), torch.empty(0, dtype=spec.index_dtype))
        torch.ops.sextant.balanced_to_lanes(
            values.contiguous(), positions.contiguous(), spec.rows, spec.columns, spec.block,
            out, out_index, spec.tile, INDEX_KINDS.index(spec.index_kind),
        )  # fmt: skip
        return out, out_index
    return from_rows_reference(values, positions, spec)


def from_rows_reference(
    values: torch.Tensor, positions: torch.Tensor, spec: BalancedSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """``from_rows`` in plain torch."""
    entries = _interleave(_in_tile(positions, spec), spec)
    flat = entries.view(spec.lane_groups, -1, LANES)
    if spec.index_kind == "8-bit":
        index = flat
    elif spec.index_kind == "4-bit":
        flat = F.pad(flat, (0, 0, 0, flat.shape[1] % 2))
        index = flat[:, 0::2] | (flat[:, 1::2] << 4)
    else:
        index = torch.zeros(spec.index_shape, dtype=torch.int32, device=values.device)
        one = torch.ones((), dtype=torch.int32, device=values.device)
        for j in range(spec.merge * spec.k):
            index |= one << entries[:, :, j].int()
    return values_from_rows(values, spec), index.contiguous()


def to_rows(values: torch.Tensor, index: torch.Tensor, spec: BalancedSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, positions uint8 [groups, blocks, k]) of the ``rows`` layout. BalancedFormatError for a broken index."""
    per_tile = spec.merge * spec.k
    entries = _entries(index, spec)
    real = spec.blocks * spec.k

    def by_row(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.view(spec.lane_groups, spec.tiles * per_tile, LANES).transpose(1, 2)
        return wide.reshape(spec.lane_groups * LANES, -1)[:, :real]

    row_values = F.pad(by_row(values)[: spec.rows], (0, 0, 0, -spec.rows % spec.vector))
    rows_values = row_values.view(spec.groups, spec.vector, spec.blocks, spec.k).permute(0, 2, 3, 1).contiguous()
    within = torch.arange(spec.blocks, device=index.device).remainder(spec.merge).mul(spec.block)
    in_block = by_row(entries)[: spec.rows].view(spec.rows, spec.blocks, spec.k).int() - within[None, :, None].int()
    if bool((in_block < 0).any()) or bool((in_block >= spec.block).any()):
        raise BalancedFormatError(f"the index names a column outside of its block of {spec.block}")
    if spec.k > 1 and bool((in_block[..., 1:] <= in_block[..., :-1]).any()):
        raise BalancedFormatError("the index does not ascend within a block")
    positions = in_block[:: spec.vector].to(torch.uint8)
    if spec.vector > 1:
        shared = positions.repeat_interleave(spec.vector, dim=0)[: spec.rows]
        if not torch.equal(shared, in_block.to(torch.uint8)):
            raise BalancedFormatError(f"the index differs within {spec.vector} rows that share their choice")
    return rows_values, positions.contiguous()


def _entries(index: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """Positions within tiles, uint8 [rows / 16, tiles * j, 16], of any index kind."""
    per_tile = spec.merge * spec.k
    if spec.index_kind == "8-bit":
        return index
    if spec.index_kind == "4-bit":
        halves = torch.stack((index & 15, index >> 4), dim=2).view(spec.lane_groups, -1, LANES)
        return halves[:, : spec.tiles * per_tile]
    left = index.long() & 0xFFFFFFFF
    entries = torch.empty(spec.lane_groups, spec.tiles, per_tile, LANES, dtype=torch.uint8, device=index.device)
    for j in range(per_tile):
        lowest = left & -left
        if bool((lowest == 0).any()):
            raise BalancedFormatError(f"a bitmap does not keep exactly {spec.k} of every {spec.block} columns")
        entries[:, :, j] = lowest.double().log2().to(torch.uint8)
        left = left ^ lowest
    if bool((left != 0).any()):
        raise BalancedFormatError(f"a bitmap does not keep exactly {spec.k} of every {spec.block} columns")
    return entries.view(spec.lane_groups, -1, LANES)
