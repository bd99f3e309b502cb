"""Paged attention: causal attention of prefill chunks and decodes straight from the KV block pool, and writing to it.

One entry point over four paths: C++ on the CPU (bit-exact across batches, chunks, block permutations and threads), Triton on
the GPU, plain torch where neither can run. Shapes (T tokens of S sequences, N table columns):

- ``kv_layer``: [num_blocks, 2, kv_heads, head_dim * 16], one layer of the pool (``kv[:, layer]``, any stride between blocks).
  Index 0 holds K as [head_dim][16] (position fastest), index 1 holds V as [16][head_dim].
- ``block_table_SN``: int32; position p of sequence s lives in slot p % 16 of block ``block_table_SN[s, p // 16]``.
- ``query_start``: int32 [S + 1]; sequence s owns tokens ``query_start[s] ... query_start[s + 1] - 1``, its last positions.
- ``context_len_S``: int32; positions in the cache, these tokens included.

The paging is that of Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from kernels.paged_attention import reference
from kernels.paged_attention.reference import BLOCK_SIZE

__all__ = ["BLOCK_SIZE", "backend_for", "paged_attention", "write_kv"]

Backend = Literal["auto", "cpp", "triton", "torch"]


@lru_cache(maxsize=1)
def _cpp() -> bool:
    from kernels import build

    return bool(build.load("paged_attention"))


@lru_cache(maxsize=1)
def _triton() -> bool:
    try:
        from kernels.paged_attention import triton  # noqa: F401
    except ImportError:
        return False
    return True


def backend_for(device: torch.device) -> Literal["cpp", "triton", "torch"]:
    """The fastest path that can run on ``device`` here."""
    if device.type == "cpu":
        return "cpp" if _cpp() else "torch"
    return "triton" if device.type == "cuda" and _triton() else "torch"


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table_SN: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
    backend: Backend = "auto",
) -> None:
    """Write ``k`` and ``v`` [T, kv_heads, head_dim] to their slots of the pool, rounded to its dtype.

    ``k`` and ``v`` may be slices of a fused qkv row (any stride between tokens). Raises ValueError or IndexError on the CPU
    when a shape, a dtype or a block index does not fit.
    """
    chosen = backend_for(k.device) if backend == "auto" else backend
    if chosen == "cpp":
        _require_cpp(backend)
        torch.ops.sextant.write_kv(k, v, kv_layer, block_table_SN, query_start, context_len_S)
    elif chosen == "triton":
        from kernels.paged_attention import triton

        triton.write_kv(k, v, kv_layer, block_table_SN, query_start, context_len_S)
    else:
        reference.write_kv(k, v, kv_layer, block_table_SN, query_start, context_len_S)


def paged_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table_SN: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
    scale: float,
    backend: Backend = "auto",
    max_query_len: int | None = None,
    max_context_len: int | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """softmax(scale * q K^T) V over positions 0 ... the token's own, for ``q`` [T, heads, head_dim]; same shape and dtype.

    head_dim is a multiple of 16, heads a multiple of kv_heads. On the CPU q is float32 and the result of a token is a
    function of its q, its position and the cache alone, bit for bit; ValueError or IndexError when an argument does not fit.

    GPU only: ``max_query_len`` (1 = pure decode, None = unknown) and ``max_context_len`` (None = the width of the table) bound
    the launch grid, so that it is static under CUDA graphs; no value is read back from the device. ``deterministic`` makes
    prefill use decode's tiles, so that the bits of a token are the same in both, at the cost of a slower prefill.
    """
    chosen = backend_for(q.device) if backend == "auto" else backend
    if chosen == "cpp":
        _require_cpp(backend)
        return torch.ops.sextant.paged_attention(q, kv_layer, block_table_SN, query_start, context_len_S, scale)
    if chosen == "triton":
        from kernels.paged_attention import triton

        return triton.paged_attention(
            q,
            kv_layer,
            block_table_SN,
            query_start,
            context_len_S,
            scale,
            max_query_len,
            max_context_len,
            deterministic,
        )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return reference.paged_attention(q, kv_layer, block_table_SN, query_start, context_len_S, scale, compute_dtype=wide)


def _require_cpp(asked: Backend) -> None:
    if asked == "cpp" and not _cpp():
        raise RuntimeError(
            "backend='cpp' needs the compiled kernels: install a C++ compiler, then run `python -m kernels.build`"
        )
