"""Launches the Triton kernels of balanced sparsity: tile sizes, the split along the columns, what x must look like for each.

Tiles and splits follow from shapes and the number of multiprocessors alone; nothing is read back from the device, so that a call
can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from kernels.balanced.format import BalancedWeight
from kernels.balanced.gpu import triton_kernels
from kernels.balanced.spec import TORCH_DTYPES, BalancedSpec

GATHER_BATCH = 16
"""Most rows of x that the gather kernel takes at once: its sums lie in registers."""
H100_MULTIPROCESSORS = 132


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; an H100's for what only plays one (the interpreter)."""
    if device.type != "cuda":
        return H100_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Split:
    """A length cut into ``parts`` of ``size`` (the last may be shorter)."""

    parts: int
    size: int


def split(length: int, programs: int, wanted: int, least: int, unit: int) -> Split:
    """Cut ``length`` so that ``programs`` become about ``wanted``, each part a multiple of ``unit`` and at least ``least``."""
    parts = max(1, min(-(-wanted // max(programs, 1)), length // least))
    size = math.ceil(math.ceil(length / parts) / unit) * unit
    return Split(-(-length // size), size)


def is_wide(spec: BalancedSpec, x_dtype: torch.dtype) -> bool:
    """Whether values and x must be multiplied in float32: their types differ, and int8 alone fits into every float exactly."""
    return TORCH_DTYPES[spec.value_type] != x_dtype and spec.value_type != "int8"


def vector_fits(spec: BalancedSpec) -> bool:
    """Whether so many rows share their choice that a tensor core takes them as one tile."""
    return spec.vector in (16, 32, 64, 128)


def gather(
    x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None, parts: int | None = None
) -> torch.Tensor:
    """``x`` [batch <= 16, columns] times a weight of the ``warps`` layout: [batch, rows]. ``parts`` forces the split."""
    spec, batch = weight.spec, x.shape[0]
    if batch > GATHER_BATCH:
        raise ValueError(f"the gather kernel takes at most {GATHER_BATCH} rows of x, not {batch}")
    rows_a_tile = min(128, max(32, triton.next_power_of_2(spec.rows)))
    tiles = triton.cdiv(spec.rows, rows_a_tile)
    cut = split(spec.steps, tiles, 4 * multiprocessors(x.device), 16, 1)
    if parts is not None:
        cut = split(spec.steps, 1, parts, 1, 1)
    samples = triton.next_power_of_2(batch)
    by_column = x.contiguous() if batch == 1 else _by_column(x, samples)
    run = _Run(x, weight, bias, cut.parts)
    triton_kernels._gather[(tiles, cut.parts)](
        by_column,
        *run.tensors,
        spec.rows,
        spec.columns,
        batch,
        spec.steps,
        spec.blocks * spec.k,
        cut.size,
        K=spec.k,
        B=spec.block,
        V=spec.vector,
        CHUNK=spec.chunk,
        NIBBLES=spec.index_kind == "4-bit",
        ROWS=rows_a_tile,
        SAMPLES=samples,
        UNROLL=4 if samples == 1 else 2 if samples <= 4 else 1,
        **run.flags,
        num_warps=rows_a_tile // 32 * (2 if samples >= 8 else 1),  # registers: samples x chunk products a row
    )
    return run.finish()


def decompress(
    x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None, parts: int | None = None
) -> torch.Tensor:
    """``x`` [batch, columns] times a weight of the ``warps`` layout on the tensor cores: [batch, rows]."""
    spec, batch = weight.spec, x.shape[0]
    padded = triton.next_power_of_2(spec.block)
    blocks_a_step = max(1, 64 // padded)
    samples = min(64, max(16, triton.next_power_of_2(batch)))
    grid = (triton.cdiv(spec.rows, 64), triton.cdiv(batch, samples))
    cut = split(spec.blocks, grid[0] * grid[1], 2 * multiprocessors(x.device), 4 * blocks_a_step, blocks_a_step)
    if parts is not None:
        cut = split(spec.blocks, 1, parts, 1, blocks_a_step)
    rows = x.contiguous()
    run = _Run(x, weight, bias, cut.parts)
    triton_kernels._decompress[(grid[0], cut.parts, grid[1])](
        rows,
        *run.tensors,
        spec.rows,
        spec.columns,
        batch,
        spec.steps,
        spec.blocks,
        cut.size,
        rows.shape[1],
        K=spec.k,
        B=spec.block,
        PADDED_B=padded,
        V=spec.vector,
        CHUNK=spec.chunk,
        NIBBLES=spec.index_kind == "4-bit",
        ROWS=64,
        SAMPLES=samples,
        BLOCKS=blocks_a_step,
        WIDE=is_wide(spec, x.dtype),
        **run.flags,
        num_warps=4,
        num_stages=2,
    )
    return run.finish()


def vector(
    x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None = None, parts: int | None = None
) -> torch.Tensor:
    """``x`` [batch, columns] times a weight whose rows share their choice (``vector_fits``): [batch, rows]."""
    spec, batch = weight.spec, x.shape[0]
    if not vector_fits(spec):
        raise ValueError(f"the vector kernel needs 16, 32, 64 or 128 rows that share their choice, not {spec.vector}")
    half = x.element_size() == 2 and not is_wide(spec, x.dtype)
    # The wider a tile, the less often values and index are read; two thread blocks fit onto a multiprocessor in both cases.
    broad = half and spec.vector >= 64 and batch >= 512
    samples = 256 if broad else min(128, max(16, triton.next_power_of_2(batch)))
    grid = (spec.groups, triton.cdiv(batch, samples))
    a_step = 64 if half and not broad else 32
    unit = a_step // spec.chunk
    cut = split(spec.steps, grid[0] * grid[1], multiprocessors(x.device), 4 * unit, unit)
    if parts is not None:
        cut = split(spec.steps, 1, parts, 1, unit)
    by_column = _by_column(x, -(-batch // 16) * 16)
    run = _Run(x, weight, bias, cut.parts)
    triton_kernels._vector[(grid[0], cut.parts, grid[1])](
        by_column,
        *run.tensors,
        spec.rows,
        spec.columns,
        batch,
        spec.steps,
        spec.blocks * spec.k,
        cut.size,
        by_column.shape[1],
        K=spec.k,
        B=spec.block,
        V=spec.vector,
        CHUNK=spec.chunk,
        NIBBLES=spec.index_kind == "4-bit",
        ENTRIES=a_step,
        SAMPLES=samples,
        WIDE=is_wide(spec, x.dtype),
        **run.flags,
        num_warps=8 if spec.vector >= 64 and samples >= 128 else 4,
        num_stages=4 if broad else 3,
    )
    return run.finish()


def _by_column(x: torch.Tensor, wide: int) -> torch.Tensor:
    """x [batch, columns] as [columns, wide], zeros behind the batch: what one entry meets lies together."""
    if wide == x.shape[0]:
        return x.t().contiguous()
    by_column = x.new_zeros(x.shape[1], wide)
    by_column[:, : x.shape[0]] = x.t()
    return by_column


class _Run:
    """The result of one product, the sums of its parts where it is split, and the arguments that all kernels share."""

    def __init__(self, x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None, parts: int):
        spec = weight.spec
        self.parts, self.shape = parts, (x.shape[0], spec.rows)
        self.out = torch.empty(self.shape, dtype=x.dtype, device=x.device)
        whole = (parts, *self.shape)
        self.partial = torch.empty(whole, dtype=torch.float32, device=x.device) if parts > 1 else self.out
        self.scales = weight.scales if weight.scales.numel() else self.out  # any address where none is read
        self.bias = self.out if bias is None else bias.contiguous()
        self.tensors = (weight.values, weight.index, self.scales, self.bias, self.out, self.partial)
        self.ends = {"SCALED": spec.value_type == "int8", "BIAS": bias is not None}
        self.flags = {"SPLIT": parts > 1, **self.ends}

    def finish(self) -> torch.Tensor:
        """The parts added, in order."""
        if self.parts > 1:
            batch, rows = self.shape
            triton_kernels._reduce[(triton.cdiv(rows, 128), batch)](
                self.partial,
                self.scales,
                self.bias,
                self.out,
                rows,
                batch,
                self.parts,
                ROWS=128,
                **self.ends,
                num_warps=4,
            )
        return self.out
