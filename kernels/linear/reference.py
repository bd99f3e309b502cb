"""What ``kernels.linear`` computes, in plain torch: the oracle of its tests and the path of a machine without a compiler."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [M, K] times ``weight`` [N, K] transposed, in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights [N, K] and one scale per output channel [N]: ``weight ~ q * scale[:, None]``, symmetric, |q| <= 127."""
    top = weight.abs().amax(dim=1).float()
    scale = torch.where(top > 0, top / 127.0, torch.ones_like(top))
    return torch.round(weight.float() / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 activations [M, K] and one scale per row [M]; the rounding (to nearest, ties to even) is that of the kernel."""
    top = x.abs().amax(dim=1)
    inverse = torch.where(top > 0, 127.0 / top, torch.zeros_like(top))
    return torch.round(x * inverse[:, None]).to(torch.int8), top / 127.0


def linear_int8(
    x: torch.Tensor, quantised: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The int8 linear as the kernel defines it: exact integer sums, one float product of the scales, one of the sum. [M, N]"""
    rows, row_scale = quantise_rows(x)
    sums = (rows.double() @ quantised.double().T).float()
    y = sums * (row_scale[:, None] * scale[None, :])
    return y if bias is None else y + bias
