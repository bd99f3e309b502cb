"""The ``warps`` layout of the GPU kernels, to and from the ``rows`` layout: 32 rows side by side, a row for each lane of a warp.

The entries of a row, block after block, are one stream: entry e lies in block e // k, because every block has k. It is cut into
chunks of 16 bytes of values, what one lane loads at once; the chunks of the 32 lanes lie side by side, 512 bytes that a warp
reads as one. values [rows / 32, steps, 32, chunk]; index uint8 [groups / 32, steps, 32, chunk], or half of it with two 4-bit
entries in a byte, low half first. Rows that share their choice share its index. Entries that only fill up are zeros in both.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels.balanced import index_codec
from kernels.balanced.spec import WARP, BalancedFormatError, BalancedSpec


def values_from_rows(values: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """values [groups, blocks, k, vector] of the ``rows`` layout in the ``warps`` layout ``spec``."""
    return _interleave(values.permute(0, 3, 1, 2).reshape(-1, spec.blocks * spec.k)[: spec.rows], spec)


def from_rows(values: torch.Tensor, positions: torch.Tensor, spec: BalancedSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, index) of the ``warps`` layout ``spec`` from the values of the ``rows`` layout and decoded positions."""
    index = _interleave(positions.reshape(spec.groups, -1), spec)
    if spec.index_kind == "4-bit":
        index = index[..., 0::2] | (index[..., 1::2] << 4)
    return values_from_rows(values, spec), index.contiguous()


def to_rows(values: torch.Tensor, index: torch.Tensor, spec: BalancedSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, positions uint8 [groups, blocks, k]) of the ``rows`` layout. BalancedFormatError for a broken index."""
    if spec.index_kind == "4-bit":
        index = torch.stack((index & 15, index >> 4), dim=4).view(*index.shape[:3], -1)
    every, real = _by_row(index), spec.blocks * spec.k
    if bool(every[spec.groups :].any()) or bool(every[:, real:].any()):
        raise BalancedFormatError("the index has entries after its last one")
    positions = every[: spec.groups, :real].reshape(spec.groups, spec.blocks, spec.k)
    index_codec.check(positions, spec)
    row_values = F.pad(_by_row(values)[: spec.rows, :real], (0, 0, 0, -spec.rows % spec.vector))
    by_group = row_values.view(spec.groups, spec.vector, spec.blocks, spec.k).permute(0, 2, 3, 1)
    return by_group.contiguous(), positions.contiguous()


def _interleave(by_row: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """[n, entries] in chunks, 32 rows side by side: [n / 32, steps, 32, chunk]."""
    missing = spec.steps * spec.chunk - by_row.shape[1]
    padded = F.pad(by_row, (0, missing, 0, -by_row.shape[0] % WARP))
    return padded.view(-1, WARP, spec.steps, spec.chunk).transpose(1, 2).contiguous()


def _by_row(interleaved: torch.Tensor) -> torch.Tensor:
    """The reverse of ``_interleave``, padding included: [32 n, steps * chunk]."""
    tiles, steps, _, chunk = interleaved.shape
    return interleaved.transpose(1, 2).reshape(tiles * WARP, steps * chunk)
