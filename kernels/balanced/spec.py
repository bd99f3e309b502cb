"""What a k:B balanced weight is, apart from its tensors: sizes, value type, index kind, layout; and the errors of this room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

ValueType = Literal["fp32", "bf16", "fp16", "int8"]
IndexKind = Literal["bitmap", "4-bit", "8-bit"]
Layout = Literal["rows", "lanes", "warps"]

VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TORCH_DTYPES: dict[ValueType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
MIN_BLOCK, MAX_BLOCK = 4, 256
LANES = 16
"""Rows that the CPU kernels go through together: the fp32 lanes of an AVX-512 register."""
TILE = 32
"""Most columns of a tile of the ``lanes`` layout that a bitmap or a 4-bit index describes: two AVX-512 registers of x."""
WARP = 32
"""Rows that a warp goes through together, in the ``warps`` layout of the GPU kernels."""


class BalancedFormatError(ValueError):
    """A weight, an index or a file that is not in the balanced format; the message says what is wrong."""


@dataclass(frozen=True)
class BalancedSpec:
    """A weight [rows, columns] with exactly ``k`` entries in each block of ``block`` columns of a row.

    ``vector``: so many consecutive rows share the choice of columns. ``index_kind`` and ``layout`` say how the tensors of a
    ``BalancedWeight`` store it (see ``kernels.balanced.format``). The last block of a row is padded with columns of zeros where
    ``block`` does not divide ``columns``, the last vector of rows with rows of zeros.
    """

    rows: int
    columns: int
    k: int
    block: int
    value_type: ValueType = "fp32"
    index_kind: IndexKind = "8-bit"
    vector: int = 1
    layout: Layout = "rows"

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "k", "block", "vector"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BalancedFormatError(f"{name} must be a positive integer, not {value!r}")
        if not MIN_BLOCK <= self.block <= MAX_BLOCK:
            raise BalancedFormatError(f"a block has {MIN_BLOCK} to {MAX_BLOCK} columns, not {self.block}")
        if self.k > self.block:
            raise BalancedFormatError(f"k = {self.k} entries do not fit into a block of {self.block} columns")
        for name, allowed in (("value_type", VALUE_TYPES), ("index_kind", INDEX_KINDS), ("layout", LAYOUTS)):
            if getattr(self, name) not in allowed:
                raise BalancedFormatError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        width = self.tile if self.layout == "lanes" else self.block
        if self.index_kind == "4-bit" and width > 16:
            raise BalancedFormatError(f"a 4-bit index names one of 16 columns, this one has {width}")
        if self.layout == "lanes" and self.index_kind == "bitmap" and width > TILE:
            raise BalancedFormatError(f"the lanes layout has bitmaps of at most {TILE} columns, not of {width}")
        if self.layout == "warps" and self.index_kind == "bitmap":
            raise BalancedFormatError("the warps layout has entries of 4 or 8 bits and no bitmaps")

    @property
    def blocks(self) -> int:
        """Blocks of a row, the padded one included."""
        return -(-self.columns // self.block)

    @property
    def groups(self) -> int:
        """Groups of ``vector`` rows, the padded one included."""
        return -(-self.rows // self.vector)

    @property
    def sparsity(self) -> float:
        """Share of entries that are not kept: 1 - k / block."""
        return 1 - self.k / self.block

    @property
    def merge(self) -> int:
        """Blocks of a tile of the ``lanes`` layout: as many small ones as its index can describe."""
        if self.index_kind == "bitmap":
            return max(1, TILE // self.block)
        return max(1, 16 // self.block)

    @property
    def tile(self) -> int:
        """Columns of a tile of the ``lanes`` layout."""
        return self.merge * self.block

    @property
    def tiles(self) -> int:
        """Tiles of a row in the ``lanes`` layout, the padded one included."""
        return -(-self.blocks // self.merge)

    @property
    def lane_groups(self) -> int:
        """Groups of ``LANES`` rows in the ``lanes`` layout."""
        return -(-self.rows // LANES)

    @property
    def chunk(self) -> int:
        """Consecutive entries of a row that lie together in the ``warps`` layout: the values of one 16-byte load."""
        return 16 // TORCH_DTYPES[self.value_type].itemsize

    @property
    def steps(self) -> int:
        """Chunks of a row in the ``warps`` layout, the padded one included."""
        return -(-self.blocks * self.k // self.chunk)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values tensor of this layout."""
        if self.layout == "rows":
            return self.groups, self.blocks, self.k, self.vector
        if self.layout == "warps":
            return -(-self.rows // WARP), self.steps, WARP, self.chunk
        return self.lane_groups, self.tiles, self.merge * self.k, LANES

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Shape of the index tensor (uint8, but int32 for bitmaps of the ``lanes`` layout)."""
        if self.layout == "warps":
            return -(-self.groups // WARP), self.steps, WARP, self.chunk // (2 if self.index_kind == "4-bit" else 1)
        kept = self.tiles * self.merge * self.k if self.layout == "lanes" else self.blocks * self.k
        if self.layout == "rows":
            length = {"bitmap": -(-self.blocks * self.block // 8), "4-bit": -(-kept // 2), "8-bit": kept}
            return self.groups, length[self.index_kind]
        length = {"bitmap": self.tiles, "4-bit": -(-kept // 2), "8-bit": kept}
        return self.lane_groups, length[self.index_kind], LANES

    @property
    def index_dtype(self) -> torch.dtype:
        """uint8, but int32 for bitmaps of the ``lanes`` layout."""
        return torch.int32 if self.layout == "lanes" and self.index_kind == "bitmap" else torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of values, index and scales in this layout: what one pass over the weight reads."""
        values = _count(self.values_shape) * TORCH_DTYPES[self.value_type].itemsize
        return values + _count(self.index_shape) * self.index_dtype.itemsize + 4 * self.scales_count

    @property
    def ideal_bytes(self) -> float:
        """Bytes without any padding: the kept values, and for each the index bits of the kind that is smallest here."""
        bits = min(self.block / self.k, 4 if self.block <= 16 else 8)
        kept = self.rows * self.columns * self.k / self.block
        index = kept * bits / 8 / self.vector
        return kept * TORCH_DTYPES[self.value_type].itemsize + index + 4 * self.scales_count

    @property
    def scales_count(self) -> int:
        """float32 scales that come with the values: one a row for int8, else none."""
        return self.rows if self.value_type == "int8" else 0

    def with_smallest_index(self, layout: Layout) -> BalancedSpec:
        """The same weight in ``layout`` with the index kind that takes fewest bytes (of equals the one cheaper to decode)."""
        best: BalancedSpec | None = None
        for kind in ("8-bit", "4-bit", "bitmap"):
            try:
                candidate = replace(self, index_kind=kind, layout=layout)
            except BalancedFormatError:
                continue
            if best is None or candidate.nbytes < best.nbytes:
                best = candidate
        if best is None:  # an 8-bit index describes every block
            raise BalancedFormatError(f"no index kind describes blocks of {self.block} columns")
        return best


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
