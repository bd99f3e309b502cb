"""Balanced sparsity: weights with k non-zeros in every block of B columns, packed, and their product with x.

After Balanced Sparsity (Yao et al., AAAI 2019). ``pack`` makes a ``BalancedWeight``, ``balanced_linear`` multiplies with it by
whichever of the sparse and the dense kernel is faster, ``BalancedLinear`` is the layer, ``save`` and ``load`` the file.
"""

from __future__ import annotations

from kernels.balanced.checkpoint import load, save
from kernels.balanced.format import BalancedWeight, pack
from kernels.balanced.linear import balanced_linear
from kernels.balanced.module import BalancedLinear
from kernels.balanced.spec import INDEX_KINDS, VALUE_TYPES, BalancedFormatError, BalancedSpec

__all__ = [
    "INDEX_KINDS",
    "VALUE_TYPES",
    "BalancedFormatError",
    "BalancedLinear",
    "BalancedSpec",
    "BalancedWeight",
    "balanced_linear",
    "load",
    "pack",
    "save",
]
