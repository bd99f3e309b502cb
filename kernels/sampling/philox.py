"""Philox4x32-10, the counter-based generator behind every draw: a token's random number is a function of (seed, position).

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Key: the 64-bit seed. Counter: (position low, position
high, 0, 0). The same integers in Python, C++ (csrc/sampling.h) and torch on any device.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF

Word4 = tuple[int, int, int, int]


def philox4x32(counter: Word4, key: tuple[int, int]) -> Word4:
    """Ten rounds over four 32-bit words, least significant word first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), a multiple of 2^-53, that chooses the token at ``position`` (both taken modulo 2^64)."""
    high, low, _, _ = philox4x32((position & _MASK, position >> 32 & _MASK, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return ((high << 32 | low) >> 11) * 2.0**-53


def uniform_torch(seed_R: torch.Tensor, position_R: torch.Tensor) -> torch.Tensor:
    """``uniform`` for int64 tensors (read as 64 unsigned bits), float64 [R] on their device, without a host sync."""
    k0, k1 = seed_R & _MASK, seed_R >> 32 & _MASK
    c0, c1 = position_R & _MASK, position_R >> 32 & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        (h0, l0), (h1, l1) = _wide_product(c0, _MULTIPLIERS[0]), _wide_product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return ((c0 << 21) + (c1 >> 11)).double() * 2.0**-53


def _wide_product(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of x * factor; through 16-bit halves of x, because int64 has no room for 64 unsigned bits."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
