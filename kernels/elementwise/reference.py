"""RMSNorm, SiLU-and-multiply and rotary embedding in plain torch, in the dtype of their arguments: oracle and fallback."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` (SwiGLU; Shazeer, 2020)."""
    return F.silu(gate) * up


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate ``x`` [T, H, D] by the angles of ``positions`` [T] (Su et al., 2021); ``table``: cosines and sines [P, 2, D/2]."""
    cosine, sine = table[positions.long()].to(x.dtype)[:, None].unbind(2)  # [T, 1, D/2] each
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
