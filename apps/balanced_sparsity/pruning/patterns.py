"""Sparsity patterns and the masks that they allow: balanced k:B, unstructured, blocks, 2:4. Exact counts, deterministic."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from kernels.balanced.selection import select
from kernels.balanced.spec import MAX_BLOCK, MIN_BLOCK

Kind = Literal["balanced", "unstructured", "block", "2:4"]
FORMS = "balanced:B, balanced:BxV, unstructured, block:RxC or 2:4"
_SIZES = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Pattern:
    """Which entries of a matrix may be zeroed together. Make one with ``balanced``, ``unstructured``, ``block``, ``two_four``.

    ``rows`` x ``columns`` is the unit that is kept or dropped as a whole times, for balanced and 2:4, the block of columns that
    entries are chosen within; ``rows`` > 1 of a balanced pattern: so many rows share their choice.
    """

    kind: Kind
    rows: int = 1
    columns: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("balanced", "unstructured", "block", "2:4"):
            raise ValueError(f"a pattern is {FORMS}, not {self.kind!r}")
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a pattern's sizes are at least 1, not {self.rows} x {self.columns}")
        if self.kind == "balanced" and not MIN_BLOCK <= self.columns <= MAX_BLOCK:
            raise ValueError(f"a balanced block has {MIN_BLOCK} to {MAX_BLOCK} columns, not {self.columns}")

    @classmethod
    def balanced(cls, block: int, vector: int = 1) -> Pattern:
        """k of every ``block`` columns of a row; ``vector`` consecutive rows share the choice."""
        return cls("balanced", vector, block)

    @classmethod
    def unstructured(cls) -> Pattern:
        """The best entries of the whole matrix (fine-grained pruning; Han et al., 2015)."""
        return cls("unstructured")

    @classmethod
    def block(cls, rows: int, columns: int) -> Pattern:
        """The best tiles of ``rows`` x ``columns`` (Narang et al., 2017)."""
        return cls("block", rows, columns)

    @classmethod
    def two_four(cls) -> Pattern:
        """2 of every 4 columns, what sparse tensor cores take; sparsity is at most 0.5."""
        return cls("2:4", 1, 4)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern of its name: ``balanced:32``, ``balanced:32x4``, ``unstructured``, ``block:8x8``, ``2:4``. ValueError."""
        if text == "unstructured":
            return cls.unstructured()
        if text == "2:4":
            return cls.two_four()
        kind, _, sizes = text.partition(":")
        match = _SIZES.fullmatch(sizes)
        if match is not None and kind == "balanced":
            return cls.balanced(int(match[1]), int(match[2] or 1))
        if match is not None and kind == "block" and match[2]:
            return cls.block(int(match[1]), int(match[2]))
        raise ValueError(f"a pattern is {FORMS}, not {text!r}")

    def __str__(self) -> str:
        if self.kind == "balanced":
            return f"balanced:{self.columns}" + (f"x{self.rows}" if self.rows > 1 else "")
        return f"block:{self.rows}x{self.columns}" if self.kind == "block" else self.kind

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity there is: one entry of a block is always kept, two of 2:4."""
        return {"balanced": 1 - 1 / self.columns, "2:4": 0.5}.get(self.kind, 1.0)

    def check(self, sparsity: float) -> None:
        """ValueError for a sparsity that the pattern cannot have."""
        if not 0 <= sparsity < 1:  # nan too
            raise ValueError(f"a sparsity is from 0 to below 1, not {sparsity}")
        if sparsity > self.max_sparsity:
            raise ValueError(f"{self} is at most {self.max_sparsity:g} sparse, not {sparsity:g}")

    def kept(self, sparsity: float) -> int:
        """k: entries that a block of a balanced or 2:4 pattern keeps, the nearest to (1 - sparsity) x block; halves round up."""
        if self.kind not in ("balanced", "2:4"):
            raise ValueError(f"{self} has no blocks with a number of entries")
        self.check(sparsity)
        return max(2 if self.kind == "2:4" else 1, _nearest((1 - sparsity) * self.columns))


def mask_of(scores: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """Which entries of a matrix are kept: bool like ``scores`` [rows, columns], the ones that score highest.

    Exact and deterministic: NaN is above infinity (a broken weight must not vanish), of equal scores the lower column, then the
    lower row wins. Counts:

    - balanced, 2:4: exactly ``pattern.kept(sparsity)`` of every block of a row. Where the block does not divide the columns, the
      last, narrower block keeps as many too, or all of its columns if they are fewer (the packed format's rule);
    - unstructured: the nearest integer to (1 - sparsity) x entries of the matrix, at least 1;
    - block: the nearest integer to (1 - sparsity) x tiles, at least 1. A tile scores by its mean, so that the narrower tiles at
      the edges compare.

    Raises:
        ValueError: no float matrix, or a sparsity that the pattern cannot have.
    """
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be a float matrix, got {scores.dtype} {tuple(scores.shape)}")
    pattern.check(sparsity)
    scores = scores.detach()
    if scores.numel() == 0 or sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pattern.kind == "unstructured":
        return _best(scores.reshape(-1), sparsity).view(scores.shape)
    if pattern.kind == "block":
        return _tiles(scores, pattern, sparsity)
    rows, columns = scores.shape
    grouped = _shared(scores, pattern.rows)
    blocks = -(-columns // pattern.columns)
    mask = torch.zeros(grouped.shape[0], blocks, pattern.columns, dtype=torch.bool, device=scores.device)
    mask.scatter_(2, select(grouped, pattern.kept(sparsity), pattern.columns).long(), True)
    by_row = mask.view(grouped.shape[0], -1)[:, :columns]
    return by_row.repeat_interleave(pattern.rows, dim=0)[:rows].contiguous()


def _shared(scores: torch.Tensor, vector: int) -> torch.Tensor:
    """Scores of ``vector`` rows that choose together, summed: [ceil(rows / vector), columns]."""
    if vector == 1:
        return scores
    padded = F.pad(scores.double(), (0, 0, 0, -scores.shape[0] % vector))
    return padded.view(-1, vector, scores.shape[1]).sum(dim=1).float()


def _tiles(scores: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    (rows, columns), (height, width) = scores.shape, (pattern.rows, pattern.columns)
    padding = (0, -columns % width, 0, -rows % height)

    def sums(of: torch.Tensor) -> torch.Tensor:
        padded = F.pad(of, padding)
        return padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width).sum(dim=(1, 3))

    means = sums(scores.double()) / sums(torch.ones_like(scores, dtype=torch.float64))
    kept = _best(means.reshape(-1), sparsity).view(means.shape)
    return kept.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns].contiguous()


def _best(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """bool: the nearest integer to (1 - sparsity) x count of the highest of a vector; of equal ones the first."""
    keep = max(1, _nearest((1 - sparsity) * scores.numel()))
    threshold = scores.kthvalue(scores.numel() - keep + 1).values  # NaN counts as greatest there, too
    broken = scores.isnan()
    equal = broken if bool(threshold.isnan()) else scores == threshold
    above = torch.zeros_like(broken) if bool(threshold.isnan()) else (scores > threshold) | broken
    missing = keep - int(above.sum())
    return above | (equal & (equal.cumsum(0) <= missing))


def _nearest(value: float) -> int:
    return math.floor(value + 0.5 + 1e-9)
