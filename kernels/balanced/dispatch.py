"""Which kernel computes a balanced product on the CPU, by a measured table: from which batch on the dense one is faster.

``python -m kernels.balanced`` measures this machine and leaves the table in the user's cache folder, keyed by the CPU and the
number of threads; until then defaults apply that were measured on a server CPU. A table only moves speed, never a number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from kernels.balanced import gpu
from kernels.balanced.format import BalancedWeight
from kernels.balanced.selection import cpp
from kernels.balanced.spec import BalancedFormatError, BalancedSpec, ValueType

logger = logging.getLogger("sextant.kernels")

Arm = Literal["sparse", "dense"]
ALWAYS = 1 << 30
"""A batch that is never reached: the sparse kernel always wins."""
VERSION = 1


@dataclass(frozen=True)
class Regime:
    """What decides between dense and sparse, apart from the batch.

    ``index``: "bitmap", "4-bit" or "8-bit" entries, with the registers of x that a tile takes on AVX-512 ("8-bit/4": 33 to 64
    columns). ``size``: log2 of rows x columns. ``x``: dtype of x, "fp32" or "bf16" (float16 counts as it).
    """

    x: Literal["fp32", "bf16"]
    value_type: ValueType
    index: str
    density: float
    size: float

    def same_kernel(self, other: Regime) -> bool:
        """Whether both run the same code, so that a measurement of one says something of the other."""
        return (self.x, self.value_type, self.index) == (other.x, other.value_type, other.index)


@dataclass(frozen=True)
class Table:
    """``dense_from`` [regime]: the smallest batch at which dense is faster. ``source``: where it comes from, for a reader."""

    dense_from: tuple[tuple[Regime, int], ...]
    source: str

    def lookup(self, regime: Regime) -> int:
        """The batch of the most careful of the measured regimes around this one; the default's where nothing was measured.

        Around means: of the same kernel, the nearest density that is not lower (more entries only ever help dense), and the sizes
        on both sides. Beyond the densest that was measured dense is taken.
        """
        same = [(entry, batch) for entry, batch in self.dense_from if entry.same_kernel(regime)]
        if not same:
            return default_dense_from(regime)
        denser = [entry.density for entry, _ in same if entry.density >= regime.density - 1e-6]
        if not denser:
            return 1
        at_density = sorted((entry.size, batch) for entry, batch in same if entry.density == min(denser))
        below = [batch for size, batch in at_density if size <= regime.size + 0.01]
        above = [batch for size, batch in at_density if size >= regime.size - 0.01]
        return min(below[-1:] + above[:1])


def regime_of(spec: BalancedSpec, x_dtype: torch.dtype) -> Regime:
    """The regime of a weight in the lanes layout."""
    registers = next(count for count in (1, 2, 4, 8, 16) if spec.tile <= 16 * count)
    return Regime(
        "fp32" if x_dtype == torch.float32 else "bf16",
        spec.value_type,
        f"{spec.index_kind}/{max(registers, 1 if spec.index_kind == '4-bit' else 2)}",
        spec.k / spec.block,
        math.log2(spec.rows * spec.columns),
    )


def default_dense_from(regime: Regime) -> int:
    """Without a measurement: by the bytes that one product reads and the work per entry of this kernel (measured on Ice Lake)."""
    kind, _, registers = regime.index.partition("/")
    value_bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8}[regime.value_type]
    index_bits = {"bitmap": 1 / regime.density, "4-bit": 4.0, "8-bit": 8.0}[kind]
    dense_bits = 32 if regime.x == "fp32" else 16
    byte_ratio = dense_bits / (regime.density * (value_bits + index_bits))
    if byte_ratio < 1.15 or regime.size < 18:  # under 512 x 512 the call costs more than the product
        return 1
    # Operations per entry against dense's one fused multiply-add: a permutation for each pair of registers, and blends.
    work = regime.density * (int(registers) + (1.0 if kind == "bitmap" else 0.5))
    if work < 0.4:
        return ALWAYS
    small = regime.size < 20
    return 2 if small or work > 3 else 8 if work > 1.5 else 32


def cpu_name() -> str:
    """The processor's name, as the table's key."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table_path(threads: int | None = None) -> Path:
    """Where the table of this CPU and so many threads lies."""
    from kernels import build

    count = torch.get_num_threads() if threads is None else threads
    facts = repr((VERSION, cpu_name(), count, torch.__version__, torch.ops.sextant.balanced_set_isa(-1)))
    return build.cache_folder().parent / "balanced" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def save(table: Table, path: Path) -> None:
    """Write a table; another process sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**vars(regime), "dense_from": batch} for regime, batch in table.dense_from]
    text = json.dumps({"version": VERSION, "source": table.source, "rows": rows}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)


def read(path: Path) -> Table:
    """A table from a file. BalancedFormatError for one that is broken."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise BalancedFormatError(f"{path} has version {content['version']}, not {VERSION}")
        rows = []
        for row in content["rows"]:
            batch = row.pop("dense_from")
            regime = Regime(**row)
            if (
                not isinstance(batch, int)
                or batch < 1
                or not 0 < float(regime.density) <= 1
                or not float(regime.size) >= 0
            ):
                raise BalancedFormatError(f"{path} holds a row that cannot be: {row}")
            rows.append((regime, batch))
        return Table(tuple(rows), str(content["source"]))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise BalancedFormatError(f"{path} is not a table of the balanced dispatcher: {error!r}") from error


@lru_cache(maxsize=8)
def _table(threads: int) -> Table:
    path = table_path(threads)
    try:
        if path.exists():
            return read(path)
    except (OSError, BalancedFormatError) as error:
        logger.warning(
            "The dispatcher's table cannot be read, defaults apply (`python -m kernels.balanced`): %s", error
        )
    return Table((), "defaults")


def table() -> Table:
    """The table in use."""
    return _table(torch.get_num_threads())


def reset() -> None:
    """Read the table again, as after a calibration. Weights that exist keep their decision until their next use."""
    global _generation
    _generation += 1
    _table.cache_clear()
    gpu.table.reset()


_generation = 0


@dataclass(frozen=True)
class Plan:
    """What was decided for one weight and one dtype of x."""

    dense_from: int
    generation: int
    on_gpu: bool
    """The GPU's own table decides (``kernels.balanced.gpu.table``)."""


def plan(weight: BalancedWeight, x_dtype: torch.dtype) -> Plan:
    """The decision, remembered per weight: looking it up takes a fraction of a microsecond."""
    found = weight.derived.get(x_dtype)
    if found is None or found.generation != _generation:
        found = Plan(_dense_from(weight, x_dtype), _generation, gpu.takes(weight.device, x_dtype))
        weight.derived[x_dtype] = found
    return found


def choose(weight: BalancedWeight, batch: int, x_dtype: torch.dtype) -> Arm:
    """The faster kernel for so many rows of x (of a GPU's several sparse ones: see ``kernels.balanced.gpu.table``)."""
    if plan(weight, x_dtype).on_gpu:
        arm = gpu.table.choose(weight.spec, weight.device, x_dtype, batch, captured=False)
        return "dense" if arm == "dense" else "sparse"
    return "dense" if batch >= plan(weight, x_dtype).dense_from else "sparse"


def sparse_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a sparse kernel here: C++ on the CPU, Triton on CUDA. What they lack (float64) is computed densely."""
    return gpu.takes(device, dtype) or (device.type == "cpu" and dtype != torch.float64 and cpp())


def _dense_from(weight: BalancedWeight, x_dtype: torch.dtype) -> int:
    if weight.device.type != "cpu" or not sparse_available(weight.device, x_dtype):
        return 1
    return table().lookup(regime_of(weight.spec.with_smallest_index("lanes"), x_dtype))
