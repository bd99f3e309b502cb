"""Paged attention on the GPU in Triton: KV writes, split-KV decode (flash-decoding) with its reduction, causal chunked prefill.

One kernel, ``_attend``, serves decode and prefill: a program takes BLOCK_M rows = query tokens x the query heads of one KV head
(so that GQA shares every load of K and V) and either one split of SPLIT positions, whose partial softmax ``_reduce`` merges, or
all positions. Splits are SPLIT positions long whatever the batch and the context, tiles start at multiples of BLOCK_N, so a
decode's bits do not depend on its batch. Nothing is read back from the device and the launch grids follow from tensor shapes and
the given bounds alone, so that a call can be captured in a CUDA graph (padding: sequences with no query tokens).

After Dao et al., "FlashAttention-2" (2023) and "Flash-Decoding for long-context inference" (2023). Shapes: see the package.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT = 256
"""Positions of one split: a fixed length keeps the order of summation, hence the bits, independent of batch and context."""

_LOG2E = 1.4426950408889634


@triton.jit
def _sequence_of(query_start, num_sequences, tile, BLOCK_Q: tl.constexpr):
    """The last sequence whose first tile, query_start[s] // BLOCK_Q + s, is not behind ``tile``."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start + middle) // BLOCK_Q + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _write_kv(
    k,
    v,
    kv,
    block_table,
    query_start,
    context_len,
    num_sequences,
    k_stride,
    v_stride,
    block_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    low = 0
    high = num_sequences
    while low < high:  # the first sequence that ends behind the token
        middle = (low + high) // 2
        if tl.load(query_start + middle + 1) <= token:
            low = middle + 1
        else:
            high = middle
    if low < num_sequences:
        position = tl.load(context_len + low) - tl.load(query_start + low + 1) + token
        block = tl.load(block_table + low * table_stride + position // 16).to(tl.int64)
        d = tl.arange(0, PADDED_DIM)
        inside = d < HEAD_DIM
        key = tl.load(k + token.to(tl.int64) * k_stride + head * HEAD_DIM + d, mask=inside, other=0.0)
        value = tl.load(v + token.to(tl.int64) * v_stride + head * HEAD_DIM + d, mask=inside, other=0.0)
        base = kv + block * block_stride + head * HEAD_DIM * 16
        slot = position % 16
        tl.store(base + d * 16 + slot, key.to(kv.dtype.element_ty), mask=inside)
        tl.store(base + KV_HEADS * HEAD_DIM * 16 + slot * HEAD_DIM + d, value.to(kv.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q,
    kv,
    out,
    partial,
    partial_max,
    partial_sum,
    block_table,
    query_start,
    context_len,
    num_sequences,
    scale_log2e,
    q_stride,
    out_stride,
    block_stride,
    table_stride,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows r of a tile: token r // GROUP, head r % GROUP. SPLIT_LEN 0: all positions, written to ``out`` directly."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = _sequence_of(query_start, num_sequences, tile, BLOCK_Q)
    begin = tl.load(query_start + sequence)
    tokens = tl.load(query_start + sequence + 1) - begin
    first_token = (tile - (begin // BLOCK_Q + sequence)) * BLOCK_Q
    context = tl.load(context_len + sequence)
    last_token = tl.minimum(first_token + BLOCK_Q, tokens) - 1
    stop = context - tokens + last_token + 1  # positions that the last row of the tile sees
    start = split * SPLIT_LEN
    if SPLIT_LEN > 0:
        stop = tl.minimum(stop, start + SPLIT_LEN)
    if (first_token < tokens) & (start < stop):
        row = tl.arange(0, BLOCK_M)
        d = tl.arange(0, PADDED_DIM)
        token = first_token + row // GROUP
        head = kv_head * GROUP + row % GROUP
        live = (row < BLOCK_Q * GROUP) & (token < tokens)
        inside = d < HEAD_DIM
        position = context - tokens + token
        place = (begin + token).to(tl.int64)
        queries = tl.load(
            q + place[:, None] * q_stride + head[:, None] * HEAD_DIM + d[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDE:  # q and the cache differ in dtype: multiply in float32
            queries = queries.to(tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
        for n0 in range(start, stop, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            valid = n < stop
            # Masked by whole blocks, and keys not masked at all (their scores are): the compiler then sees that 16
            # positions are contiguous and loads them at once.
            column = n // 16
            used = column < (stop + 15) // 16
            block = tl.load(block_table + sequence * table_stride + column, mask=used, other=0).to(tl.int64)
            base = kv + block * block_stride + kv_head * HEAD_DIM * 16
            keys = tl.load(base[None, :] + d[:, None] * 16 + (n % 16)[None, :], mask=inside[:, None], other=0.0)
            if WIDE:
                keys = keys.to(tl.float32)
            scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2e
            scores = tl.where((n[None, :] <= position[:, None]) & valid[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A row that sees none of these positions yet has -inf on both sides: subtract 0 instead.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(p, 1)
            values = tl.load(
                base[:, None] + KV_HEADS * HEAD_DIM * 16 + (n % 16)[:, None] * HEAD_DIM + d[None, :],
                mask=valid[:, None] & inside[None, :],
                other=0.0,
            )
            if WIDE:
                values = values.to(tl.float32)
            acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
            top = higher
        # A row of a later split than its own position has seen nothing: weight 0 in the reduction.
        safe = tl.where(total > 0.0, total, 1.0)
        result = acc / safe[:, None]
        mask = live[:, None] & inside[None, :]
        if SPLIT_LEN > 0:
            slot = (place * (KV_HEADS * GROUP) + head) * num_splits + split
            tl.store(partial + slot[:, None] * HEAD_DIM + d[None, :], result, mask=mask)
            tl.store(partial_max + slot, top, mask=live)
            tl.store(partial_sum + slot, total, mask=live)
        else:
            where = out + place[:, None] * out_stride + head[:, None] * HEAD_DIM + d[None, :]
            tl.store(where, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _reduce(
    out,
    partial,
    partial_max,
    partial_sum,
    query_start,
    context_len,
    num_sequences,
    out_stride,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
):
    """Merge a token's splits in position order."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle + 1) <= token:
            low = middle + 1
        else:
            high = middle
    if low < num_sequences:
        seen = tl.load(context_len + low) - tl.load(query_start + low + 1) + token + 1
        d = tl.arange(0, PADDED_DIM)
        inside = d < HEAD_DIM
        base = (token.to(tl.int64) * HEADS + head) * num_splits
        top = float("-inf")
        total = 0.0
        acc = tl.zeros([PADDED_DIM], tl.float32)
        for split in range((seen + SPLIT_LEN - 1) // SPLIT_LEN):
            split_max = tl.load(partial_max + base + split)
            split_sum = tl.load(partial_sum + base + split)
            value = tl.load(partial + (base + split) * HEAD_DIM + d, mask=inside, other=0.0)
            higher = tl.maximum(top, split_max)
            decay = tl.exp2(top - higher)
            weight = split_sum * tl.exp2(split_max - higher)
            acc = acc * decay + weight * value
            total = total * decay + weight
            top = higher
        result = acc / total
        tl.store(
            out + token.to(tl.int64) * out_stride + head * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=inside
        )


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table_SN: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
) -> None:
    """Write keys and values to their slots; tokens behind query_start[S] (padding of a CUDA graph) are left out."""
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    _write_kv[(tokens, kv_heads)](
        k,
        v,
        kv_layer,
        block_table_SN,
        query_start,
        context_len_S,
        context_len_S.shape[0],
        k.stride(0),
        v.stride(0),
        kv_layer.stride(0),
        block_table_SN.stride(0),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


def paged_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_table_SN: torch.Tensor,
    query_start: torch.Tensor,
    context_len_S: torch.Tensor,
    scale: float,
    max_query_len: int | None = None,
    max_context_len: int | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """See kernels.paged_attention.paged_attention. Rows behind query_start[S] (padding) are left undefined.

    Pure decode (``max_query_len == 1``) splits the context; other batches do so only if ``deterministic``, so that a token has
    the same bits as in a decode (the same tiles, instructions and order of splits).
    """
    tokens, heads, head_dim = q.shape
    sequences = context_len_S.shape[0]
    kv_heads = kv_layer.shape[2]
    group = heads // kv_heads
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0 or sequences == 0:
        return out
    decode = max_query_len == 1
    split = decode or deterministic
    context = min(max_context_len or block_table_SN.shape[1] * 16, block_table_SN.shape[1] * 16)
    num_splits = triton.cdiv(context, SPLIT) if split else 1
    # 16 rows are the least a tensor core takes. In decode tiles a token sits alone, in both modes: same place, same bits.
    block_m = max(16, triton.next_power_of_2(group)) if split else max(64, triton.next_power_of_2(group))
    block_q = 1 if split else block_m // group
    if split:
        slots = tokens * heads * num_splits
        partial = torch.empty((slots, head_dim), dtype=torch.float32, device=q.device)
        partial_max = torch.empty(slots, dtype=torch.float32, device=q.device)
        partial_sum = torch.empty(slots, dtype=torch.float32, device=q.device)
    else:
        partial = partial_max = partial_sum = out
    wide_row = head_dim * q.element_size() > 256
    _attend[(tokens // block_q + sequences, kv_heads, num_splits)](
        q,
        kv_layer,
        out,
        partial,
        partial_max,
        partial_sum,
        block_table_SN,
        query_start,
        context_len_S,
        sequences,
        scale * _LOG2E,
        q.stride(0),
        out.stride(0),
        kv_layer.stride(0),
        block_table_SN.stride(0),
        num_splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=32 if wide_row else 64,
        SPLIT_LEN=SPLIT if split else 0,
        WIDE=q.dtype != kv_layer.dtype,
        num_warps=4,
        num_stages=2,
    )
    if split:
        _reduce[(tokens, heads)](
            out,
            partial,
            partial_max,
            partial_sum,
            query_start,
            context_len_S,
            sequences,
            out.stride(0),
            num_splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            SPLIT_LEN=SPLIT,
            num_warps=1,
        )
    return out
