"""What a record says of tensors: dtype and bytes; and their memory as bytes. No Ray."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from actors.c4.recorder.records import ElementType

_TYPES = {
    torch.float32: ElementType.FLOAT32, torch.float64: ElementType.FLOAT64, torch.float16: ElementType.FLOAT16,
    torch.bfloat16: ElementType.BFLOAT16, torch.int8: ElementType.INT8, torch.uint8: ElementType.UINT8,
    torch.int16: ElementType.INT16, torch.int32: ElementType.INT32, torch.int64: ElementType.INT64,
    torch.bool: ElementType.BOOL,
}  # fmt: skip
SUMMABLE = frozenset(_TYPES) - {torch.bool}


def flat_tensors(tensors: Any) -> list[torch.Tensor]:
    """The tensors in a tensor, a list or a list of lists."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for part in tensors for tensor in flat_tensors(part)]


def element_type(tensors: list[torch.Tensor]) -> int:
    """Their common dtype, NONE for none or mixed ones."""
    if not tensors:
        return ElementType.NONE
    dtype = tensors[0].dtype
    if len(tensors) > 1 and any(tensor.dtype != dtype for tensor in tensors):
        return ElementType.NONE
    return _TYPES.get(dtype, ElementType.OTHER)


def total_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory (also bfloat16's, which numpy does not know); valid while the tensor lives."""
    count = tensor.numel() * tensor.element_size()
    if count == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B")
