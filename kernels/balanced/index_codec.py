"""The index of the ``rows`` layout: positions within blocks to and from bitmaps, 4-bit and 8-bit entries; checked."""

from __future__ import annotations

import numpy as np
import torch

from kernels.balanced.spec import BalancedFormatError, BalancedSpec


def encode(positions: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """Positions uint8 [groups, blocks, k] as the index of ``spec`` in the ``rows`` layout: uint8 ``spec.index_shape``.

    bitmap: bit c (least significant first) of a group says that column c is kept. 4-bit: two entries a byte, low half first.
    """
    groups, blocks, k = positions.shape
    flat = positions.reshape(groups, blocks * k)
    if spec.index_kind == "8-bit":
        return flat.contiguous()
    if spec.index_kind == "4-bit":
        if blocks * k % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        return (flat[:, 0::2] | (flat[:, 1::2] << 4)).contiguous()
    mask = torch.zeros(groups, blocks, spec.block, dtype=torch.uint8, device=positions.device)
    mask.scatter_(2, positions.long(), 1)
    packed = np.packbits(mask.view(groups, -1).cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(positions.device)


def decode(index: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """The positions of an index of the ``rows`` layout: uint8 [groups, blocks, k], ascending within a block.

    Raises BalancedFormatError for an index that does not keep exactly k different columns of every block.
    """
    shape = (spec.groups, spec.blocks, spec.k)
    if spec.index_kind == "bitmap":
        bits = np.unpackbits(index.cpu().numpy(), axis=1, bitorder="little")
        if bits[:, spec.blocks * spec.block :].any():
            raise BalancedFormatError("the bitmap has bits set beyond its last block")
        mask = bits[:, : spec.blocks * spec.block].reshape(spec.groups, spec.blocks, spec.block)
        if (mask.sum(axis=2, dtype=np.int64) != spec.k).any():
            raise BalancedFormatError(f"the bitmap does not keep exactly {spec.k} of every {spec.block} columns")
        kept = np.flatnonzero(mask.reshape(-1)) % spec.block
        return torch.from_numpy(kept.astype(np.uint8).reshape(shape)).to(index.device)
    if spec.index_kind == "8-bit":
        positions = index.reshape(shape)
    else:
        halves = torch.stack((index & 15, index >> 4), dim=2).view(spec.groups, -1)
        if spec.blocks * spec.k % 2 and bool((halves[:, -1] != 0).any()):
            raise BalancedFormatError("the 4-bit index has an entry after its last one")
        positions = halves[:, : spec.blocks * spec.k].reshape(shape)
    check(positions, spec)
    return positions


def check(positions: torch.Tensor, spec: BalancedSpec) -> None:
    """Raises BalancedFormatError unless the positions ascend within their block and lie in it."""
    if positions.numel() and int(positions.max()) >= spec.block:
        raise BalancedFormatError(f"the index names column {int(positions.max())} of a block of {spec.block}")
    if spec.k > 1 and bool((positions[..., 1:] <= positions[..., :-1]).any()):
        raise BalancedFormatError("the index does not ascend within a block")
