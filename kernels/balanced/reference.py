"""What ``kernels.balanced`` computes, in float64 over the unpacked weight: the oracle of its tests and benchmarks."""

from __future__ import annotations

import torch

from kernels.balanced.format import BalancedWeight


def linear(x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., columns] times the weight [rows, columns] transposed (+ ``bias`` [rows]), in float64."""
    values = weight.unpack_values().double()
    if weight.spec.value_type == "int8":
        values = values * weight.scales.double()[:, None]
    y = x.double() @ values.T
    return y if bias is None else y + bias.double()


def backward(x: torch.Tensor, weight: BalancedWeight, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in float64 of x and, as a dense matrix that is zero where nothing is kept, of the weight."""
    dense = weight.unpack_values().double()
    rows, columns = weight.rows, weight.columns
    of_weight = grad.double().reshape(-1, rows).T @ x.double().reshape(-1, columns)
    return grad.double() @ dense, of_weight * weight.mask()
