"""The arms of a balanced product on a GPU, by name: which of them a weight has, and the product by one; CUDA C++ before Triton.

``gather``: SIMT, batch 1 to 16. ``decompress``: dense tiles put together on chip, tensor cores, meant for 16 to 128. ``vector``:
16 and more rows that share their choice, for 256 and more. ``2:4``: torch's semi-structured tensor. ``dense``: cuBLAS.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Literal

import torch
from torch.nn import functional as F

from kernels.balanced.format import BalancedWeight, pack
from kernels.balanced.gpu import compiled
from kernels.balanced.semi_structured import to_torch
from kernels.balanced.spec import TORCH_DTYPES, BalancedSpec

logger = logging.getLogger("sextant.kernels")

GpuArm = Literal["dense", "gather", "decompress", "vector", "2:4"]
GATHER_BATCH = 16
VECTORS = (16, 32, 64, 128)
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton can be imported; without it a GPU computes densely. Said once."""
    try:
        from kernels.balanced.gpu import launch  # noqa: F401
    except ImportError as error:
        logger.warning(
            "Triton is missing, balanced products on a GPU are computed densely: %s (pip install 'sextant[gpu]')", error
        )
        return False
    return True


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels of this room for such an x."""
    return device.type == "cuda" and dtype in X_DTYPES and has_triton()


def fitting(spec: BalancedSpec, x_dtype: torch.dtype, batch: int) -> list[GpuArm]:
    """The arms that can compute this product, dense first."""
    arms: list[GpuArm] = ["dense"]
    if x_dtype not in X_DTYPES:
        return arms
    if batch <= GATHER_BATCH:
        arms.append("gather")
    arms.append("decompress")
    if spec.vector in VECTORS:
        arms.append("vector")
    # The shapes that both of torch's libraries take.
    same = x_dtype != torch.float32 and TORCH_DTYPES[spec.value_type] == x_dtype
    if (spec.k, spec.block) == (2, 4) and same and spec.rows % 32 == 0 and spec.columns % 64 == 0:
        arms.append("2:4")
    return arms


def working(spec: BalancedSpec, x_dtype: torch.dtype, batch: int, device: torch.device) -> list[GpuArm]:
    """The ``fitting`` arms that really compute on this device; to be asked where times are measured, it runs a product."""
    fits = fitting(spec, x_dtype, batch)
    return fits if "2:4" not in fits or two_of_four_works(device, x_dtype) else [arm for arm in fits if arm != "2:4"]


@cache
def two_of_four_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's 2:4 kernels run here and give the right numbers; they depend on the GPU and on how torch was built."""
    weight = pack(torch.randn(128, 256, device=device), 2, 4, value_type="fp16" if dtype == torch.float16 else "bf16")
    x = torch.randn(64, 256, device=device).to(dtype)
    try:
        y = product("2:4", x, weight, None)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("torch's 2:4 kernels do not run on %s: %s", device, str(error).partition(". ")[0])
        return False
    if torch.allclose(y.float(), x.float() @ weight.unpack(torch.float32).T, rtol=2e-2, atol=2e-1):
        return True
    logger.warning("torch's 2:4 kernels give wrong numbers on %s, they are not used", device)
    return False


def product(
    arm: GpuArm, x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None, use_compiled: bool = True
) -> torch.Tensor:
    """``x`` [batch, columns] times the weight by ``arm``, which must be ``fitting``: [batch, rows] of x's dtype.

    ``use_compiled``: take the CUDA C++ kernel where there is one.
    """
    with _on(x.device):
        if arm == "dense":
            return F.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        if arm == "2:4":
            # torch's kernels take 16-byte aligned rows.
            aligned = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
            return F.linear(aligned, semi_structured(weight), None if bias is None else bias.to(x.dtype))
        weight = in_warps(weight)
        if use_compiled and (made := _compiled(arm, x, weight, bias)) is not None:
            return made
        from kernels.balanced.gpu import launch

        kernels = {"gather": launch.gather, "decompress": launch.decompress, "vector": launch.vector}
        return kernels[arm](x, weight, bias)


def _compiled(arm: GpuArm, x: torch.Tensor, weight: BalancedWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    request = compiled_request(arm, weight.spec, x.dtype, x.shape[0])
    if request is None or x.device.type != "cuda":
        return None
    loaded = compiled.library(request, _capability(x.device))
    if loaded is None:
        return None
    from kernels.balanced.gpu.launch import multiprocessors

    stream = torch.cuda.current_stream(x.device).cuda_stream
    return compiled.product(request, loaded, x, weight, bias, multiprocessors(x.device), stream)


def compiled_request(arm: GpuArm, spec: BalancedSpec, x_dtype: torch.dtype, batch: int) -> compiled.Request | None:
    """What the CUDA C++ kernel of this arm is compiled for, None where there is none."""
    if arm == "gather":
        return compiled.gather_request(spec, x_dtype, batch)
    return compiled.decompress_request(spec, x_dtype, batch) if arm == "decompress" else None


def in_warps(weight: BalancedWeight) -> BalancedWeight:
    """The weight in the layout of the GPU kernels; made once and kept where it came in another."""
    if weight.spec.layout == "warps":
        return weight
    made: BalancedWeight = weight.derive("warps", lambda: weight.to_layout("warps"))
    return made


def dense(weight: BalancedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The unpacked weight, kept beside the packed one until its values change."""
    made: torch.Tensor = weight.derive(("dense", dtype), lambda: weight.unpack(dtype))
    return made


def semi_structured(weight: BalancedWeight) -> torch.Tensor:
    """torch's 2:4 tensor: cuSPARSELt's where torch has it, else CUTLASS's from our own packing."""

    def make() -> torch.Tensor:
        try:
            from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

            return SparseSemiStructuredTensorCUSPARSELT.from_dense(weight.unpack())
        except (ImportError, RuntimeError, NotImplementedError) as error:
            logger.info("torch has no cuSPARSELt here, CUTLASS's 2:4 kernel runs: %s", error)
            return to_torch(weight)

    made: torch.Tensor = weight.derive("2:4", make)
    return made


def sparse_arm(spec: BalancedSpec, batch: int) -> GpuArm:
    """The arm of this room that is meant for a batch."""
    if batch <= compiled.GATHER_BATCH:
        return "gather"
    return "vector" if spec.vector in VECTORS and batch > GATHER_BATCH else "decompress"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton and CUDA launch on the current device: make it that of x."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
