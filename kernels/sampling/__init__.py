"""Sampling: from logits to tokens with penalties, temperature, min-p, top-k, top-p, reproducible draws and logprobs.

The random number of a token is Philox(seed, position): nothing else, so a request's tokens do not depend on where, when or in
which batch it runs. Order of operations as in vLLM's sampler: logprobs of the raw logits; bias and bans; repetition, frequency
and presence penalties; temperature; min-p; top-k; top-p; draw by the inverse of the distribution function in token-id order.
Ties go to the lowest id (unlike transformers' top-k, which keeps every token equal to the k-th). ``reference`` is the definition
in float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from kernels.sampling import batched
from kernels.sampling.batch import SamplingBatch, SamplingResult, SamplingRow, TokenCounts

__all__ = ["SamplingBatch", "SamplingResult", "SamplingRow", "TokenCounts", "sample"]


@lru_cache(maxsize=1)
def _cpp() -> bool:
    from kernels import build

    return bool(build.load("sampling"))


def sample(
    logits_RV: torch.Tensor, batch: SamplingBatch, backend: Literal["auto", "cpp", "torch"] = "auto"
) -> SamplingResult:
    """Choose one token for each row of ``logits_RV`` [R, V].

    float32 on the CPU (any float dtype on a GPU, where the result stays on the device and nothing is synchronised). The CPU's C++
    path treats every row alone, bit for bit, whatever the batch or the number of threads; it changes the logits while it works
    and restores them. Raises ValueError for shapes that do not fit and IndexError for a penalised or biased token outside the
    vocabulary. A row with NaN or +inf logits, or with every token banned, gets token -1.
    """
    if len(batch) != logits_RV.shape[0]:
        raise ValueError(f"{len(batch)} rows of parameters for {logits_RV.shape[0]} rows of logits")
    on_cpu = logits_RV.device.type == "cpu"
    if backend == "torch" or not on_cpu or (backend == "auto" and not _cpp()):
        return batched.sample(logits_RV, batch)
    if not _cpp():
        raise RuntimeError(
            "backend='cpp' needs the compiled kernels: install a C++ compiler, then run `python -m kernels.build`"
        )
    return SamplingResult(
        *torch.ops.sextant.sample(
            logits_RV,
            batch.real,
            batch.integer,
            batch.penalty_start,
            batch.penalty_ids,
            batch.penalty_counts,
            batch.bias_start,
            batch.bias_ids,
            batch.bias_values,
        )
    )
