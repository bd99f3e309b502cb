"""The fused divergence on the GPU in Triton: q, k and the int8 table go in, one number for each row and head comes out.

Forward: a program takes BLOCK_M wanted rows of one sequence and one head, streams blocks of keys, and keeps two online
logsumexps (attention's and the target's) and the target-weighted sum of logit differences, since
KL = E_g[t - a] - lse(t) + lse(a). Backward: dKL/da_j = A_j - g_j, recomputed; dq by the same programs, dk by programs that own
a block of keys and walk the sequence's rows: no atomics, so that a resumed run repeats its bits. After Dao 2023
(FlashAttention-2). Shapes: see the package.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.guided_attention.reference import Mixture, Rows, TableView


@triton.jit
def _logits(
    queries, keys, position, mine, first, second, n, sequence, table, ids, kept, document, size, vocab,
    scale, first_weight, second_weight, live, HAS_SECOND: tl.constexpr,
):  # fmt: skip
    """Attention logits a, target logits t (both [BLOCK_M, BLOCK_N]), where t speaks (kept), and what a may see (seen)."""
    inside = n < size
    base = sequence.to(tl.int64) * size
    a = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    x = tl.load(ids + base + n, mask=inside, other=0)
    seen = live[:, None] & inside[None, :]
    seen = seen & (tl.load(document + base + n, mask=inside, other=-2)[None, :] == mine[:, None])
    good = tl.load(kept + base + n, mask=inside, other=0) != 0
    speaks = seen & good[None, :] & (n[None, :] != position[:, None])
    t = tl.load(table + first.to(tl.int64)[:, None] * vocab + x[None, :], mask=speaks, other=0).to(tl.float32)
    t = t * first_weight
    if HAS_SECOND:
        more = tl.load(table + second.to(tl.int64)[:, None] * vocab + x[None, :], mask=speaks, other=0).to(tl.float32)
        t = t + more * second_weight
    return a, t, speaks, seen


@triton.jit
def _forward(
    q, k, out, lse_a, lse_t, position_of, start, first_of, second_of, table, ids, kept, document, size, vocab, scale,
    first_weight, second_weight, q_stride_b, q_stride_g, q_stride_s, k_stride_b, k_stride_g, k_stride_s,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SECOND: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    row = tl.load(start + sequence) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < tl.load(start + sequence + 1)
    d = tl.arange(0, PADDED_DIM)
    position = tl.load(position_of + row, mask=live, other=0)
    mine = tl.load(document + sequence.to(tl.int64) * size + position, mask=live, other=-3)
    first = tl.load(first_of + row, mask=live, other=0)
    second = first
    if HAS_SECOND:
        second = tl.load(second_of + row, mask=live, other=0)
    q_base = q + sequence.to(tl.int64) * q_stride_b + head * q_stride_g
    queries = tl.load(
        q_base + position[:, None] * q_stride_s + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0
    )
    k_base = k + sequence.to(tl.int64) * k_stride_b + head * k_stride_g
    top_a = tl.full([BLOCK_M], -1e30, tl.float32)
    top_t = tl.full([BLOCK_M], -1e30, tl.float32)
    sum_a = tl.zeros([BLOCK_M], tl.float32)
    sum_t = tl.zeros([BLOCK_M], tl.float32)
    gap = tl.zeros([BLOCK_M], tl.float32)  # sum of exp(t - top_t) (t - a)
    for n0 in range(0, size, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = tl.load(
            k_base + n[:, None] * k_stride_s + d[None, :], mask=(n < size)[:, None] & (d < HEAD_DIM)[None, :], other=0.0
        )
        a, t, speaks, seen = _logits(
            queries, keys, position, mine, first, second, n, sequence, table, ids, kept, document, size, vocab,
            scale, first_weight, second_weight, live, HAS_SECOND,
        )  # fmt: skip
        if RENORMALISE:
            seen = speaks
        higher_a = tl.maximum(top_a, tl.max(tl.where(seen, a, -1e30), 1))
        sum_a = sum_a * tl.exp(top_a - higher_a) + tl.sum(tl.where(seen, tl.exp(a - higher_a[:, None]), 0.0), 1)
        top_a = higher_a
        higher_t = tl.maximum(top_t, tl.max(tl.where(speaks, t, -1e30), 1))
        decay = tl.exp(top_t - higher_t)
        weight = tl.where(speaks, tl.exp(t - higher_t[:, None]), 0.0)
        sum_t = sum_t * decay + tl.sum(weight, 1)
        gap = gap * decay + tl.sum(weight * tl.where(speaks, t - a, 0.0), 1)
        top_t = higher_t
    empty = sum_t == 0.0
    safe_t = tl.where(empty, 1.0, sum_t)
    total_a = tl.where(empty, 0.0, top_a + tl.log(tl.where(sum_a == 0.0, 1.0, sum_a)))
    total_t = tl.where(empty, 0.0, top_t + tl.log(safe_t))
    slot = row * HEADS + head
    tl.store(out + slot, tl.where(empty, 0.0, gap / safe_t - total_t + total_a), mask=live)
    tl.store(lse_a + slot, total_a, mask=live)
    tl.store(lse_t + slot, total_t, mask=live)


@triton.jit
def _slope(a, t, speaks, seen, total_a, total_t, given, RENORMALISE: tl.constexpr):
    """d loss / d a [BLOCK_M, BLOCK_N]: (sum_j g_j) A - g, times what came from above; a row without kept keys has none."""
    if RENORMALISE:
        seen = speaks
    weight = tl.where(seen, tl.exp(a - total_a[:, None]), 0.0)
    goal = tl.where(speaks, tl.exp(t - total_t[:, None]), 0.0)
    return (weight - goal) * given[:, None]


@triton.jit
def _backward_q(
    q, k, given_of, dq, lse_a, lse_t, position_of, start, first_of, second_of, table, ids, kept, document, size, vocab,
    scale, first_weight, second_weight, q_stride_b, q_stride_g, q_stride_s, k_stride_b, k_stride_g, k_stride_s,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SECOND: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """dq of the wanted rows, stored to their places in dq [B, G, S, D] (zero elsewhere)."""
    tile = tl.program_id(0)
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    row = tl.load(start + sequence) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < tl.load(start + sequence + 1)
    d = tl.arange(0, PADDED_DIM)
    position = tl.load(position_of + row, mask=live, other=0)
    mine = tl.load(document + sequence.to(tl.int64) * size + position, mask=live, other=-3)
    first = tl.load(first_of + row, mask=live, other=0)
    second = first
    if HAS_SECOND:
        second = tl.load(second_of + row, mask=live, other=0)
    slot = row * HEADS + head
    given = tl.load(given_of + slot, mask=live, other=0.0)
    total_a = tl.load(lse_a + slot, mask=live, other=0.0)
    total_t = tl.load(lse_t + slot, mask=live, other=0.0)
    wide = live[:, None] & (d < HEAD_DIM)[None, :]
    q_base = q + sequence.to(tl.int64) * q_stride_b + head * q_stride_g
    queries = tl.load(q_base + position[:, None] * q_stride_s + d[None, :], mask=wide, other=0.0)
    k_base = k + sequence.to(tl.int64) * k_stride_b + head * k_stride_g
    has = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for n0 in range(0, size, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = tl.load(
            k_base + n[:, None] * k_stride_s + d[None, :], mask=(n < size)[:, None] & (d < HEAD_DIM)[None, :], other=0.0
        )
        a, t, speaks, seen = _logits(
            queries, keys, position, mine, first, second, n, sequence, table, ids, kept, document, size, vocab,
            scale, first_weight, second_weight, live, HAS_SECOND,
        )  # fmt: skip
        slope = _slope(a, t, speaks, seen, total_a, total_t, given, RENORMALISE)
        has = tl.maximum(has, tl.max(tl.where(speaks, 1.0, 0.0), 1))
        acc += tl.dot(slope, keys.to(tl.float32), input_precision="ieee")
    acc = acc * scale * has[:, None]
    place = dq + ((sequence.to(tl.int64) * HEADS + head) * size + position[:, None]) * HEAD_DIM + d[None, :]
    tl.store(place, acc.to(dq.dtype.element_ty), mask=wide)


@triton.jit
def _backward_k(
    q, k, given_of, dk, lse_a, lse_t, position_of, start, first_of, second_of, table, ids, kept, document, size, vocab,
    scale, first_weight, second_weight, q_stride_b, q_stride_g, q_stride_s, k_stride_b, k_stride_g, k_stride_s,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SECOND: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """dk of one block of keys, over all wanted rows of the sequence in their order."""
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, PADDED_DIM)
    wide = (n < size)[:, None] & (d < HEAD_DIM)[None, :]
    k_base = k + sequence.to(tl.int64) * k_stride_b + head * k_stride_g
    keys = tl.load(k_base + n[:, None] * k_stride_s + d[None, :], mask=wide, other=0.0)
    q_base = q + sequence.to(tl.int64) * q_stride_b + head * q_stride_g
    begin = tl.load(start + sequence)
    end = tl.load(start + sequence + 1)
    acc = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    for row0 in range(begin, end, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        live = row < end
        position = tl.load(position_of + row, mask=live, other=0)
        mine = tl.load(document + sequence.to(tl.int64) * size + position, mask=live, other=-3)
        first = tl.load(first_of + row, mask=live, other=0)
        second = first
        if HAS_SECOND:
            second = tl.load(second_of + row, mask=live, other=0)
        slot = row * HEADS + head
        # The rows without kept keys were given zero: whether one has any is not known from this block of keys.
        given = tl.load(given_of + slot, mask=live, other=0.0)
        total_a = tl.load(lse_a + slot, mask=live, other=0.0)
        total_t = tl.load(lse_t + slot, mask=live, other=0.0)
        queries = tl.load(
            q_base + position[:, None] * q_stride_s + d[None, :],
            mask=live[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        a, t, speaks, seen = _logits(
            queries, keys, position, mine, first, second, n, sequence, table, ids, kept, document, size, vocab,
            scale, first_weight, second_weight, live, HAS_SECOND,
        )  # fmt: skip
        slope = _slope(a, t, speaks, seen, total_a, total_t, given, RENORMALISE)
        acc += tl.dot(tl.trans(slope), queries.to(tl.float32), input_precision="ieee")
    place = dk + ((sequence.to(tl.int64) * HEADS + head) * size + n[:, None]) * HEAD_DIM + d[None, :]
    tl.store(place, (acc * scale).to(dk.dtype.element_ty), mask=wide)


class _GuidedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, position, start, first, second, table, ids, kept, document, longest, numbers, renormalise):
        batch, heads, size, dim = q.shape
        out = torch.empty(len(position), heads, dtype=torch.float32, device=q.device)
        lse_a, lse_t = torch.empty_like(out), torch.empty_like(out)
        where = (position, start, first, second if second is not None else first, table, ids, kept, document)
        options = {
            "HEADS": heads, "HEAD_DIM": dim, "PADDED_DIM": max(16, triton.next_power_of_2(dim)), "BLOCK_M": 16,
            "BLOCK_N": 64 if dim <= 64 else 32, "HAS_SECOND": second is not None, "RENORMALISE": renormalise,
        }  # fmt: skip
        grid = (triton.cdiv(longest, options["BLOCK_M"]), batch, heads)
        strides = (*q.stride()[:3], *k.stride()[:3])
        _forward[grid](q, k, out, lse_a, lse_t, *where, size, table.shape[1], *numbers, *strides, **options)
        # What tells a row without kept keys from the others: both of its logsumexps are exactly zero.
        ctx.save_for_backward(q, k, lse_a, lse_t, *where)
        ctx.rest = (longest, numbers, strides, options)
        return out

    @staticmethod
    def backward(ctx, given):
        q, k, lse_a, lse_t, *where = ctx.saved_tensors
        longest, numbers, strides, options = ctx.rest
        batch, heads, size, _ = q.shape
        table = where[4]
        given = torch.where((lse_a == 0) & (lse_t == 0), 0.0, given.float()).contiguous()
        dq, dk = (
            torch.zeros(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=k.dtype, device=k.device),
        )
        rest = (lse_a, lse_t, *where, size, table.shape[1], *numbers, *strides)
        _backward_q[(triton.cdiv(longest, options["BLOCK_M"]), batch, heads)](q, k, given, dq, *rest, **options)
        _backward_k[(triton.cdiv(size, options["BLOCK_N"]), batch, heads)](q, k, given, dk, *rest, **options)
        return dq, dk, *([None] * 11)


def guided_kl(
    q_BGSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    rows: Rows,
    kept_BS: torch.Tensor,
    document_BS: torch.Tensor,
    ids_BS: torch.Tensor,
    table: TableView,
    mixture: Mixture,
    scale: float,
    renormalise: bool,
) -> torch.Tensor:
    """See the package's ``guided_kl``."""
    if not len(rows):
        return (q_BGSD.float().sum() + k_BGSD.float().sum()) * q_BGSD.new_zeros(0, q_BGSD.shape[1], dtype=torch.float32)
    q = q_BGSD if q_BGSD.stride(-1) == 1 else q_BGSD.contiguous()
    k = k_BGSD if k_BGSD.stride(-1) == 1 else k_BGSD.contiguous()
    indices = (rows.position_E, rows.start, mixture.first_E, mixture.second_E)
    int32 = [None if x is None else x.to(torch.int32).contiguous() for x in indices]
    numbers = (scale, mixture.first * table.step, mixture.second * table.step)
    return _GuidedKL.apply(
        q, k, *int32, table.table_VV.contiguous(), ids_BS.to(torch.int32).contiguous(), kept_BS.to(torch.int8).contiguous(),
        document_BS.to(torch.int32).contiguous(), rows.longest, numbers, renormalise,
    )  # fmt: skip
