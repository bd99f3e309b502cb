"""What an engine is told at its start: which model, in which numbers, with how much KV memory and how large a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

EMBEDDED_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class EngineConfig:
    """One engine's settings; a nested part of ``apps.llumnix``'s configuration (pydantic validates it there).

    ``model`` is a path to a GGUF file, to a Hugging Face folder or to a balanced checkpoint (weights/balanced.py), a hub name
    (``owner/name``), or the embedded default. ``dtype`` is of the dense matrices; balanced ones have their own in their file.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: str = EMBEDDED_MODEL
    dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    kv_dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "cpp", "torch"] = "auto"
    """CPU path: ``cpp`` is bit-exact across batches and fast; ``torch`` runs without a compiler, slower and not bit-exact."""
    threads: int = 1
    """Intra-op threads of this engine's process (CPU only)."""
    kv_memory_mib: int = 512
    block_size: int = 16
    max_model_len: int = 8192
    """Longest prompt + output in tokens; lowered to the model's own context length when that is shorter."""
    max_num_seqs: int = 64
    max_batched_tokens: int = 256
    """Tokens of one step, prefill chunks and decodes together."""
    watermark: float = 0.01
    """Fraction of the KV blocks kept free when a new request is admitted, so that running ones can grow."""
    prefix_caching: bool = True
    cuda_graphs: bool = True
    deterministic: bool = True
    """GPU only: fixed-order split-K and batch-invariant tiles, at a cost that benchmarks.llumnix_engine states."""
