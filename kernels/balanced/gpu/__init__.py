"""Balanced sparsity on a GPU: the product by the arm that the table names; ``kernels.balanced.linear`` comes here for CUDA.

``arms`` are the kernels by name, ``table`` decides among them, ``measure`` fills the table; ``launch`` and ``triton_kernels`` are
Triton's, ``compiled`` and ``csrc`` CUDA C++. Nothing here imports Triton or needs nvcc before a product asks for it.
"""

from __future__ import annotations

import torch

from kernels.balanced.format import BalancedWeight
from kernels.balanced.gpu import arms, table
from kernels.balanced.gpu.arms import GpuArm, takes

__all__ = ["GpuArm", "arms", "linear", "table", "takes"]


def linear(
    x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None, arm: GpuArm | None = None
) -> torch.Tensor:
    """``x`` [..., columns], not empty, times the weight (+ ``bias`` [rows]): [..., rows]; by the table or by ``arm``."""
    rows = x.reshape(-1, weight.spec.columns)
    if arm is None:
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        arm = table.choose(weight.spec, x.device, x.dtype, rows.shape[0], captured)
    return arms.product(arm, rows, weight, bias).view(*x.shape[:-1], weight.spec.rows)
