"""Plain-torch paged attention: the oracle of the fast paths, and the fallback where no compiler or Triton exists.

Gathers the blocks of each sequence and loops over the sequences: easy to check, slow, and (through its matrix products) not
bit-exact across batches unless ``compute_dtype`` is wide enough to hide it.
"""

from __future__ import annotations

import torch

BLOCK_SIZE = 16
"""Positions in a block of the pool, fixed by the layout of K: [head_dim][16]."""


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table_SN: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
) -> None:
    """Write the keys and values of every sequence's newest tokens into their slots (arguments: see the package)."""
    num_blocks, _, kv_heads, block_elements = kv_layer.shape
    head_dim = block_elements // BLOCK_SIZE
    keys = kv_layer[:, 0].unflatten(-1, (head_dim, BLOCK_SIZE))
    values = kv_layer[:, 1].unflatten(-1, (BLOCK_SIZE, head_dim))
    starts = query_start.tolist()
    for s, context_len in enumerate(context_len_S.tolist()):
        begin, end = starts[s], starts[s + 1]
        position = torch.arange(context_len - (end - begin), context_len, device=k.device)
        block = block_table_SN[s].long()[position // BLOCK_SIZE]
        keys[block, :, :, position % BLOCK_SIZE] = k[begin:end].to(kv_layer.dtype)
        values[block, :, position % BLOCK_SIZE] = v[begin:end].to(kv_layer.dtype)


def gather(kv_layer: torch.Tensor, blocks: torch.Tensor, context_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [kv_heads, context_len, head_dim] of the sequence that owns ``blocks``, copied out of the pool."""
    _, _, kv_heads, block_elements = kv_layer.shape
    head_dim = block_elements // BLOCK_SIZE
    used = blocks[: -(-context_len // BLOCK_SIZE)].long()
    keys = kv_layer[used, 0].view(-1, kv_heads, head_dim, BLOCK_SIZE).permute(1, 0, 3, 2)
    values = kv_layer[used, 1].view(-1, kv_heads, BLOCK_SIZE, head_dim).permute(1, 0, 2, 3)
    return (
        keys.reshape(kv_heads, -1, head_dim)[:, :context_len],
        values.reshape(kv_heads, -1, head_dim)[:, :context_len],
    )


def paged_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table_SN: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
    scale: float,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal attention [T, heads, head_dim] in ``compute_dtype``, returned in q's dtype (arguments: see the package)."""
    tokens, heads, head_dim = q.shape
    kv_heads = kv_layer.shape[2]
    out = torch.empty_like(q)
    starts = query_start.tolist()
    for s, context_len in enumerate(context_len_S.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        keys, values = (x.to(compute_dtype) for x in gather(kv_layer, block_table_SN[s], context_len))
        rows = q[begin:end].to(compute_dtype).view(end - begin, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("tkgd,knd->kgtn", rows, keys) * scale
        position = torch.arange(context_len - (end - begin), context_len, device=q.device)
        future = torch.arange(context_len, device=q.device)[None, :] > position[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[begin:end] = (
            torch.einsum("kgtn,knd->tkgd", weights, values).reshape(end - begin, heads, head_dim).to(q.dtype)
        )
    return out
