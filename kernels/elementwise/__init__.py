"""The small operations of a decoder layer on the CPU: RMSNorm, SiLU-and-multiply, rotary embedding; fp32, row by row.

A row's bits depend on that row alone. ``reference`` holds the same in plain torch, for any device and dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kernels.elementwise import reference

__all__ = ["rms_norm", "rope", "rope_table", "silu_mul"]


@lru_cache(maxsize=1)
def _cpp() -> bool:
    from kernels import build

    return bool(build.load("elementwise"))


def _use_cpp(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and _cpp()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; ``weight`` [x.shape[-1]]. ValueError if it does not fit."""
    if _use_cpp(x):
        return torch.ops.sextant.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, elementwise, of two tensors of one shape."""
    return torch.ops.sextant.silu_mul(gate, up) if _use_cpp(gate) else reference.silu_mul(gate, up)


def rope_table(inverse_frequencies: torch.Tensor, positions: int, factor: float = 1.0) -> torch.Tensor:
    """Cosines and sines of ``position * inverse_frequencies`` [D/2], times ``factor``: float32 [positions, 2, D/2].

    Angles are computed in float64, so that the table is the same on every machine.
    """
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse_frequencies.double()[None, :]
    return (torch.stack((angles.cos(), angles.sin()), dim=1) * factor).float().contiguous()


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate ``x`` [T, H, D] by ``positions`` [T] with ``rope_table``'s angles: pairs (2i, 2i+1) if interleaved, else (i, i+D/2).

    Raises IndexError for a position outside the table (C++ path) and ValueError for shapes that do not fit.
    """
    if _use_cpp(x):
        return torch.ops.sextant.rope(x, positions, table, interleaved)
    return reference.rope(x, positions, table, interleaved)
