"""GGML's block formats back to fp32, whole tensors at a time. Used by gguf.py at load.

Layouts and formulas: ggml-quants.c of llama.cpp. The five common formats are written in torch because they are in most
files and this is several times quicker than the NumPy ones of the ``gguf`` library, which serve for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType


def _fp16(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The half-precision number in bytes first, first+1 of every block -> fp32 [blocks, 1]."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> fp32 [..., 2n]: all low nibbles, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).float()


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_fp16(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_fp16(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_fp16(blocks, 0)).add_(_fp16(blocks, 2))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 weights: 8 sub-blocks of 32 with 6-bit scales and minimums that share 12 bytes."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1).float().mul_(_fp16(blocks, 0))
    minimums = torch.cat((mid & 63, (high >> 4) | ((mid >> 2) & 48)), dim=1).float().mul_(_fp16(blocks, 2))
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return q.mul_(scales[:, :, None]).sub_(minimums[:, :, None]).view(-1, 256)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 weights: 4 low bits, 2 high bits, 16 signed scales of 8 bits, then the block's scale."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> torch.tensor([0, 4], dtype=torch.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    q = (low & 15).reshape(-1, 256) | ((high & 3).reshape(-1, 256) << 4)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float().mul_(_fp16(blocks, 208))
    return (q.float().sub_(32).view(-1, 16, 16) * scales[:, :, None]).view(-1, 256)


_OWN: dict[GgmlType, Callable[[torch.Tensor], torch.Tensor]] = {
    GgmlType.Q8_0: _q8_0,
    GgmlType.Q4_0: _q4_0,
    GgmlType.Q4_1: _q4_1,
    GgmlType.Q4_K: _q4_k,
    GgmlType.Q6_K: _q6_k,
}
_PLAIN = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}


def is_supported(kind: GgmlType) -> bool:
    """Whether ``dequantise`` reads this format."""
    return kind in _OWN or kind in _PLAIN or kind in gguf.quants._type_traits


def dequantise(raw: torch.Tensor, kind: GgmlType, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 tensor of ``shape`` from the file's bytes (uint8 [bytes]); fp16 and bf16 keep their precision.

    ValueError for a format that nothing here reads.
    """
    if kind in _PLAIN:
        return raw.clone().view(_PLAIN[kind]).view(shape)  # The clone is aligned; a mapped file need not be.
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if kind in _OWN:
        return _OWN[kind](raw.view(-1, block_bytes)).view(shape)
    if not is_supported(kind):
        raise ValueError(f"the format {kind.name} is not supported")
    array = gguf.quants.dequantize(raw.numpy().reshape(-1, block_bytes), kind)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).view(shape)
