"""Weights and patterns that the tests of balanced sparsity share."""

from __future__ import annotations

import pytest
import torch

from kernels.balanced.selection import cpp

needs_cpp = pytest.mark.skipif(not cpp(), reason="no C++ compiler: the compiled kernels cannot be built")

PATTERNS = [
    (2, 4),
    (1, 5),
    (3, 6),
    (3, 7),
    (8, 16),
    (4, 16),
    (1, 10),
    (16, 32),
    (3, 32),
    (2, 20),
    (32, 64),
    (5, 100),
    (128, 256),
]
"""(k, block): every index kind, merged blocks, and a tile in one, two, four, eight and sixteen registers."""
SHAPES = [(16, 64), (33, 100), (130, 37), (1, 1), (150, 520)]
"""(rows, columns): whole and broken groups of rows, blocks and tiles; more than eight groups of rows."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
