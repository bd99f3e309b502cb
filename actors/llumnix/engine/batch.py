"""The input of one forward pass: the flattened tokens of all sequences in it (prefill chunks and decodes mixed)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelBatch:
    """T tokens of S sequences, R rows of logits wanted. All tensors live on the CPU; the model moves them.

    ``block_table_SN[s, j]`` is the pool block of positions 16*j ... 16*j+15 of sequence s (rows padded with 0).
    A token at position p of sequence s writes its key and value to slot p % 16 of block ``block_table_SN[s, p // 16]``
    and attends to positions 0 ... p.
    """

    token_ids_T: torch.Tensor
    """int64"""
    positions_T: torch.Tensor
    """int32"""
    query_start: torch.Tensor
    """int32 [S+1]: sequence s owns tokens query_start[s] ... query_start[s+1]-1, consecutive positions."""
    context_len_S: torch.Tensor
    """int32: positions in the cache after this pass (last query position + 1)."""
    block_table_SN: torch.Tensor
    """int32"""
    logits_rows_R: torch.Tensor
    """int64: which of the T tokens get logits, ascending."""
