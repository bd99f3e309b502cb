"""Linear layers of CPU inference over packed weights: fp32, bf16 or int8, the same bits for a row in whatever batch.

Weights are packed once into panels of 32 output columns; activations are fp32 rows, which the bf16 kind rounds to bf16 and the
int8 kind quantises with one scale per row (weights: one per output channel). Each output is one accumulation in k order and
threads divide output columns only, so a row's result depends neither on the batch nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch.nn import functional as F

from kernels.linear import reference

__all__ = ["KINDS", "PackedLinear", "linear", "numerics", "pack"]

Kind = Literal["fp32", "bf16", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")
PANEL = 32


@dataclass(frozen=True)
class PackedLinear:
    """A weight [n, k] ready for the kernels. ``data``: fp32 [P, k, 32], bf16 [P, k/2, 32, 2] or int8 [P, k/4, 32, 4].

    ``scales`` (float32) and ``offsets`` (int32: 128 x the sum of a column's weights, because the kernel's activations are
    unsigned) have one entry per padded column and are empty but for int8.
    """

    dtype: Kind
    n: int
    k: int
    data: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        return self.data.nbytes + self.scales.nbytes + self.offsets.nbytes

    def unpack(self) -> torch.Tensor:
        """The weight as it is stored, back in [n, k]: fp32, bf16, or int8 without its scales."""
        panels = self.data.shape[0]
        step = {"fp32": 1, "bf16": 2, "int8": 4}[self.dtype]
        blocked = self.data.view(panels, -1, PANEL, step).permute(0, 2, 1, 3)
        return blocked.reshape(panels * PANEL, -1)[: self.n, : self.k].contiguous()


@lru_cache(maxsize=1)
def _cpp() -> bool:
    from kernels import build

    return bool(build.load("linear"))


def pack(weight: torch.Tensor, dtype: Kind) -> PackedLinear:
    """Pack ``weight`` [N, K] (any float dtype, CPU). Raises ValueError for another shape or an unknown ``dtype``."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight to pack must be a float matrix, got {weight.dtype} {tuple(weight.shape)}")
    if dtype not in KINDS:
        raise ValueError(f"dtype must be one of {', '.join(KINDS)}, got {dtype!r}")
    n, k = weight.shape
    step = {"fp32": 1, "bf16": 2, "int8": 4}[dtype]
    scales, offsets = torch.empty(0), torch.empty(0, dtype=torch.int32)
    if dtype == "int8":
        stored, scale = reference.quantise_weight(weight)
        columns = -(-n // PANEL) * PANEL
        scales = F.pad(scale, (0, columns - n))
        offsets = F.pad(stored.to(torch.int32).sum(dim=1, dtype=torch.int32) * 128, (0, columns - n))
    else:
        stored = weight.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    stored = F.pad(stored, (0, -k % step, 0, -n % PANEL))
    blocked = stored.view(-1, PANEL, stored.shape[1] // step, step).permute(0, 2, 1, 3)
    data = _weight_memory(blocked.shape, blocked.dtype).copy_(blocked)
    return PackedLinear(dtype, n, k, data.squeeze(-1) if step == 1 else data, scales, offsets)


def _weight_memory(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a packed weight: in huge pages, which a decode step streams half again as fast, where there is C++."""
    nbytes = shape.numel() * dtype.itemsize
    if nbytes == 0 or not _cpp():
        return torch.empty(shape, dtype=dtype)
    return torch.ops.sextant.weight_memory(nbytes).view(dtype).view(shape)


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [M, K] float32 times the packed weight [N, K] transposed (+ ``bias`` [N]): float32 [M, N].

    Raises ValueError for shapes that do not fit. Without a compiler a torch path runs: the same numbers within rounding, but its
    bits may depend on the batch.
    """
    if x.dim() != 2 or x.shape[1] != packed.k or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [rows, {packed.k}], got {x.dtype} {tuple(x.shape)}")
    if _cpp():
        kind = KINDS.index(packed.dtype)
        return torch.ops.sextant.packed_linear(x, kind, packed.n, packed.data, packed.scales, packed.offsets, bias)
    weight = packed.unpack()
    if packed.dtype == "int8":
        return reference.linear_int8(x, weight, packed.scales[: packed.n], bias)
    rows = x if packed.dtype == "fp32" else x.bfloat16().float()
    return F.linear(rows, weight.float(), bias)


def numerics(dtype: Kind) -> str:
    """Names what decides the bits of a result on this machine, e.g. ``bf16-dp-fma``: equal names, equal bits.

    ``dp`` is AVX512-BF16's instruction, ``amx`` that of AMX tiles; the last word says whether this machine's kernels, attention
    and norms included, round a multiply and an add once (``fma``) or twice (``muladd``). The environment variable
    ``SEXTANT_LINEAR_ISA`` (avx2, avx512, avx512_bf16 or amx) holds a newer CPU to an older one's bits.
    """
    return torch.ops.sextant.linear_numerics(KINDS.index(dtype)) if _cpp() else f"torch-{dtype}"
