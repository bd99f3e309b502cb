"""Which arm computes a balanced product on a GPU, by a measured table: for each kernel, density and size the arm at each batch.

``python -m kernels.balanced --device cuda`` measures it. What lies between measurements takes an arm only when all neighbours
agree, and dense otherwise; without a table careful defaults apply, from the bytes that are read (unmeasured: see ``default``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import get_args

import torch

from kernels import build
from kernels.balanced.gpu.arms import GATHER_BATCH, GpuArm, fitting
from kernels.balanced.spec import TORCH_DTYPES, BalancedFormatError, BalancedSpec

logger = logging.getLogger("sextant.kernels")

VERSION = 1
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class GpuRegime:
    """What decides apart from the batch: dtype of x, value type, block, rows that share a choice, density, log2 of the size.

    ``captured``: in a CUDA graph, where a call costs nothing; else Python and the launch count, and small products are dense.
    """

    x: str
    value_type: str
    block: int
    vector: int
    density: float
    size: float
    captured: bool

    def same_kernel(self, other: GpuRegime) -> bool:
        """Whether both run the same code, so that a measurement of one says something of the other."""
        mine = (self.x, self.value_type, self.block, self.vector, self.captured)
        return mine == (other.x, other.value_type, other.block, other.vector, other.captured)


@dataclass(frozen=True)
class GpuTable:
    """``arms``: the fastest at each measured batch, ascending. ``source``: where it comes from, for a reader."""

    arms: tuple[tuple[GpuRegime, tuple[tuple[int, GpuArm], ...]], ...]
    source: str

    def lookup(self, regime: GpuRegime, batch: int) -> GpuArm | None:
        """The arm that all measured neighbours agree on, else dense; None where this kernel was never measured.

        Neighbours: of the same kernel the nearest density that is not lower (more entries only ever help dense), the sizes on
        both sides, and of each the batches on both sides. Denser than all that was measured is dense.
        """
        same = [(entry, arms) for entry, arms in self.arms if entry.same_kernel(regime)]
        if not same:
            return None
        denser = [entry.density for entry, _ in same if entry.density >= regime.density - 1e-6]
        if not denser:
            return "dense"
        near = sorted((entry.size, arms) for entry, arms in same if entry.density == min(denser))
        below = [arms for size, arms in near if size <= regime.size + 0.01]
        above = [arms for size, arms in near if size >= regime.size - 0.01]
        found: set[GpuArm] = set()
        for arms in below[-1:] + above[:1]:
            smaller = [arm for measured, arm in arms if measured <= batch]
            larger = [arm for measured, arm in arms if measured >= batch]
            found.update(smaller[-1:] + larger[:1])
        return found.pop() if len(found) == 1 else "dense"


def regime_of(spec: BalancedSpec, x_dtype: torch.dtype, captured: bool) -> GpuRegime:
    """The regime of a weight and a dtype of x."""
    size = math.log2(spec.rows * spec.columns)
    return GpuRegime(
        DTYPE_NAMES[x_dtype], spec.value_type, spec.block, spec.vector, spec.k / spec.block, size, captured
    )


def default(spec: BalancedSpec, x_dtype: torch.dtype, batch: int, captured: bool) -> GpuArm:
    """Without a measurement, by the ceilings of the roofline: bytes for small batches, skipped products for large ones.

    On an H100 a dense 16-bit product is bound by its bytes up to a batch of about 230, a decompressed one to about half of the
    ceiling's gain, and beyond only a vector-balanced weight multiplies less than dense does.
    """
    density = spec.k / spec.block
    index_bytes = min(spec.block / spec.k / 8, 0.5 if spec.block <= 16 else 1.0) / spec.vector
    ratio = x_dtype.itemsize / (density * (TORCH_DTYPES[spec.value_type].itemsize + index_bytes))
    if spec.rows * spec.columns < 1 << (20 if captured else 26):  # the call costs more than the product
        return "dense"
    if batch <= 4:
        return "gather" if ratio >= 1.25 else "dense"
    if spec.vector >= 32 and density <= 0.375 and batch > GATHER_BATCH:
        return "vector"
    if x_dtype != torch.float32 and ratio >= 2.5 and batch <= 32:
        return "decompress"
    return "dense"


def table_path(device: torch.device) -> Path:
    """Where the table of this kind of GPU lies."""
    from kernels.balanced.gpu.compiled import nvcc

    facts = repr((VERSION, torch.cuda.get_device_name(device), torch.__version__, nvcc() is not None))
    name = f"gpu-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    return build.cache_folder().parent / "balanced" / name


def save(table: GpuTable, path: Path) -> None:
    """Write a table; another process sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**vars(regime), "arms": arms} for regime, arms in table.arms]
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps({"version": VERSION, "source": table.source, "rows": rows}, indent=1))
    Path(temporary).replace(path)


def read(path: Path) -> GpuTable:
    """A table from a file. BalancedFormatError for one that is broken."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise BalancedFormatError(f"{path} has version {content['version']}, not {VERSION}")
        rows = []
        for row in content["rows"]:
            arms = tuple((int(batch), arm) for batch, arm in row.pop("arms"))
            regime = GpuRegime(**row)
            batches = [batch for batch, _ in arms]
            known = all(arm in get_args(GpuArm) for _, arm in arms)
            if not known or not batches or batches != sorted(set(batches)) or not 0 < float(regime.density) <= 1:
                raise BalancedFormatError(f"{path} holds a row that cannot be: {row}")
            rows.append((regime, arms))
        return GpuTable(tuple(rows), str(content["source"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BalancedFormatError):
            raise
        raise BalancedFormatError(f"{path} is not a table of the GPU dispatcher: {error!r}") from error


@lru_cache(maxsize=16)
def table(device: torch.device) -> GpuTable:
    """The table in use for a device; empty where nothing was measured."""
    try:
        path = table_path(device)
        if path.exists():
            return read(path)
    except (OSError, BalancedFormatError) as error:
        logger.warning(
            "The GPU dispatcher's table cannot be read, defaults apply (`python -m kernels.balanced --device cuda`): %s",
            error,
        )
    return GpuTable((), "defaults")


@lru_cache(maxsize=4096)
def choose(spec: BalancedSpec, device: torch.device, x_dtype: torch.dtype, batch: int, captured: bool) -> GpuArm:
    """The arm that computes this product."""
    found = table(device).lookup(regime_of(spec, x_dtype, captured), batch)
    arm = default(spec, x_dtype, batch, captured) if found is None else found
    return arm if arm in fitting(spec, x_dtype, batch) else "dense"


def reset() -> None:
    """Read the tables again, as after a measurement."""
    table.cache_clear()
    choose.cache_clear()
