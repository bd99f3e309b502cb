"""The CUDA C++ kernels (csrc): compiled by nvcc at first use, one small library for each pattern, and their launch.

k, B and the types are constants of a library, so that all loops over a chunk unroll; it takes two seconds and is kept in the
user's cache folder, as the C++ kernels of the CPU are (``kernels.build``). Without nvcc Triton's kernels run instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kernels import build
from kernels.balanced.format import BalancedWeight
from kernels.balanced.spec import WARP, BalancedSpec

logger = logging.getLogger("sextant.kernels")

CSRC = Path(__file__).parent / "csrc"
Source = Literal["gather", "decompress"]
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
TYPES = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3}
X_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INDEXES = {"8-bit": 0, "4-bit": 1, "bitmap": 2}
GATHER_BATCH = 4
SHARED_BYTES = 96 * 1024
"""Of shared memory that the gather kernel's part of x may take: two thread blocks fit onto a multiprocessor."""
WIDEST_TILE = 256
"""Columns of a dense tile of the decompress kernel."""
ARGUMENTS = [ctypes.c_void_p] * 7 + [ctypes.c_int] * 8 + [ctypes.c_void_p]
"""Of a launcher: tensors, sizes and the device, the stream."""
WARPS = 16
"""Of a thread block of the gather kernel."""


@dataclass(frozen=True)
class Request:
    """What a library is compiled for."""

    source: Source
    k: int
    block: int
    vector: int
    value_type: str
    x_type: int
    index: str
    samples: int

    @property
    def defines(self) -> tuple[str, ...]:
        """The macros of ``weight.cuh`` and of the source."""
        numbers = {
            "K": self.k, "B": self.block, "V": self.vector, "VALUE": TYPES[self.value_type], "X": self.x_type,
            "INDEX": INDEXES[self.index], "SAMPLES": self.samples,
        }  # fmt: skip
        return tuple(f"-DSEXTANT_{name}={number}" for name, number in numbers.items())


def nvcc() -> str | None:
    """The CUDA compiler: ``CUDACXX``, nvcc on the PATH or in ``CUDA_HOME``; None when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc" if home else None):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def command_for(request: Request, target: Path, capability: tuple[int, int]) -> list[str]:
    """The call of nvcc that compiles ``request``. BuildError without nvcc."""
    compiler = nvcc()
    if compiler is None:
        raise build.BuildError("there is no nvcc; install the CUDA toolkit or set CUDA_HOME")
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    return [compiler, *FLAGS, arch, *request.defines, str(CSRC / f"{request.source}.cu"), "-o", str(target)]


@functools.cache
def library(request: Request, capability: tuple[int, int]) -> ctypes.CDLL | None:
    """The library, compiled now if need be; None where it cannot be. The first reason is logged once."""
    try:
        loaded = ctypes.CDLL(str(_built(request, capability)))
    except (build.BuildError, OSError, subprocess.SubprocessError) as error:
        _warn(str(error))
        return None
    loaded.sextant_launch.argtypes = ARGUMENTS
    return loaded


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("The CUDA C++ kernels of balanced sparsity are not available, Triton's run instead: %s", reason)


def _built(request: Request, capability: tuple[int, int]) -> Path:
    sources = sorted(CSRC.iterdir())
    digest = hashlib.sha256(repr((request, capability, FLAGS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    command = command_for(request, Path("library"), capability)
    digest.update(_version(command[0]).encode())
    path = build.cache_folder() / f"balanced-{request.source}-{digest.hexdigest()[:20]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                command = command_for(request, made, capability)
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
                if done.returncode != 0:
                    lines = "\n".join((done.stderr or done.stdout).splitlines()[:12])
                    raise build.BuildError(f"{Path(command[0]).name} failed on {request}:\n{lines}")
                made.replace(path)
    return path


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout


def index_of(spec: BalancedSpec) -> str:
    """The index that the gather kernel reads: bitmaps where they are smallest and 32 columns hold whole blocks."""
    if spec.vector == 1 and WARP % spec.block == 0:
        bits = 4 if spec.index_kind == "4-bit" else 8
        if spec.block / spec.k < bits:
            return "bitmap"
    return spec.index_kind


@functools.lru_cache(maxsize=4096)
def gather_request(spec: BalancedSpec, x_dtype: torch.dtype, batch: int) -> Request | None:
    """The gather kernel of this product, None for one that it does not do."""
    if x_dtype not in X_TYPES or batch > GATHER_BATCH:
        return None
    samples = 1 if batch == 1 else 2 if batch == 2 else 4
    return _request("gather", spec, x_dtype, index_of(spec), samples)


@functools.lru_cache(maxsize=4096)
def decompress_request(spec: BalancedSpec, x_dtype: torch.dtype, batch: int) -> Request | None:
    """The decompress kernel of this product, None for one that it does not do."""
    same = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": x_dtype}.get(spec.value_type)
    if x_dtype not in (torch.bfloat16, torch.float16) or x_dtype != same or _tile_columns(spec) > WIDEST_TILE:
        return None
    samples = 16 if batch <= 16 else 32 if batch <= 32 else 64
    return _request("decompress", spec, x_dtype, spec.index_kind, samples)


def _request(source: Source, spec: BalancedSpec, x_dtype: torch.dtype, index: str, samples: int) -> Request:
    return Request(source, spec.k, spec.block, spec.vector, spec.value_type, X_TYPES[x_dtype], index, samples)


def _tile_columns(spec: BalancedSpec) -> int:
    """Columns of a tile for few samples: a whole number of chunks of entries and of 16 columns, 128 and more (decompress.cu)."""
    unit = spec.block * math.lcm(spec.chunk // math.gcd(spec.k, spec.chunk), 16 // math.gcd(spec.block, 16))
    return -(-128 // unit) * unit


def bitmap(weight: BalancedWeight, unit_blocks: int) -> torch.Tensor:
    """int32 [rows / 32, words, 32]: bit c of word w says that the row keeps column 32 w + c; padded to whole units of blocks."""
    spec = weight.spec
    blocks = -(-spec.blocks // unit_blocks) * unit_blocks
    kept = torch.zeros(-(-spec.rows // WARP) * WARP, blocks, spec.block, dtype=torch.bool, device=weight.device)
    kept[: spec.rows, : spec.blocks].scatter_(2, weight.positions().long(), True)
    words = kept.view(-1, WARP, blocks * spec.block // 32, 32)
    # Bits 0 to 30 add up to what an int32 holds; bit 31 is its sign.
    weights = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], dtype=torch.int32, device=weight.device)
    return torch.where(words, weights, 0).sum(dim=3, dtype=torch.int32).transpose(1, 2).contiguous()


def product(
    request: Request,
    loaded: ctypes.CDLL,
    x: torch.Tensor,
    weight: BalancedWeight,
    bias: torch.Tensor | None,
    multiprocessors: int,
    stream: int,
    parts: int | None = None,
) -> torch.Tensor:
    """``x`` [batch, columns] times a weight of the ``warps`` layout: [batch, rows]. ``parts`` forces the split."""
    spec, batch = weight.spec, x.shape[0]
    unit = loaded.sextant_unit_blocks()
    if request.source == "gather":
        tiles, most = -(-spec.rows // WARP), SHARED_BYTES // (4 * request.samples * spec.block) - spec.chunk
        least = -(-2 * WARPS * spec.chunk // spec.k)  # blocks: two chunks for each warp
        wanted = multiprocessors + multiprocessors // 2
    else:
        tiles, most = -(-spec.rows // 64) * -(-batch // request.samples), spec.blocks
        least, wanted = 4 * unit, 3 * multiprocessors
    count = parts or max(-(-spec.blocks // max(most, unit)), min(wanted // tiles, spec.blocks // max(least, 1)), 1)
    size = math.ceil(math.ceil(spec.blocks / count) / unit) * unit
    if request.source == "gather":
        size = min(size, max(most // unit, 1) * unit)
    count = -(-spec.blocks // size)
    index = weight.index
    if request.index == "bitmap":
        index = weight.derive(("bitmap", unit), lambda: bitmap(weight, unit), of_values=False)
    values, index, x = _aligned(weight, "values", weight.values), _aligned(weight, "index", index), x.contiguous()
    out = torch.empty(batch, spec.rows, dtype=x.dtype, device=x.device)
    partial = torch.empty((count, batch, spec.rows) if count > 1 else 0, dtype=torch.float32, device=x.device)
    bias = None if bias is None else bias.float().contiguous()
    pointers = (x, values, index, weight.scales, bias, out, partial)
    error = loaded.sextant_launch(
        *(None if tensor is None else tensor.data_ptr() for tensor in pointers),
        spec.rows, spec.columns, batch, spec.steps, spec.blocks, size, count, x.device.index or 0, stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the CUDA kernel {request.source} could not be launched: CUDA error {error} ({request})")
    return out


def _aligned(weight: BalancedWeight, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The kernels load 16 bytes at once: a tensor that begins in between is copied (a part of a larger one)."""
    if tensor.data_ptr() % 16 == 0:
        return tensor
    return weight.derive(("aligned", name), tensor.clone, of_values=name == "values")
