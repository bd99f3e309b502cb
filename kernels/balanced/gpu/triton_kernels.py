"""The Triton kernels of balanced sparsity: gather (batch 1 to 16), decompress (16 to 128), vector (256 and more), a reduction.

All read the ``warps`` layout (``kernels.balanced.warps``): entry e of a row lies in block e // k, so no kernel reads a pointer.
Where a product is split along the columns for more parallel work, every part writes its float32 sums to ``partial``
[splits, batch, rows] and ``_reduce`` adds them in order: no atomics, the same bits every time. ``launch`` calls these.

The gather over packed blocks is that of Yao et al., "Balanced Sparsity for Efficient DNN Inference on GPU" (2019); multiplying a
decompressed tile on the tensor cores that of Xia et al., "Flash-LLM" (2023); rows that share their choice, so that the gathered
tile is dense, that of Lin et al., "Efficient GPU Kernels for N:M-Sparse Weights in Deep Learning" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entries(index, place, entry_in_chunk, mask, NIBBLES: tl.constexpr):
    """In-block positions of the entries ``entry_in_chunk`` of the chunks at ``place`` (in entries): int32."""
    if NIBBLES:
        byte = tl.load(index + (place + entry_in_chunk) // 2, mask=mask, other=0).to(tl.int32)
        found = (byte >> (entry_in_chunk % 2 * 4)) & 15
    else:
        found = tl.load(index + place + entry_in_chunk, mask=mask, other=0).to(tl.int32)
    return found


@triton.jit
def _finish(
    acc,
    row,
    sample,
    split,
    scales,
    bias,
    out,
    partial,
    rows,
    batch,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """``acc`` [rows of the tile, samples], transposed to ``out`` [batch, rows], or as it is to its part of ``partial``."""
    mask = (row < rows)[:, None] & (sample < batch)[None, :]
    place = sample[None, :].to(tl.int64) * rows + row[:, None]
    if SPLIT:
        tl.store(partial + split.to(tl.int64) * batch * rows + place, acc, mask=mask)
    else:
        if SCALED:
            acc *= tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
        if BIAS:
            acc += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _reduce(
    partial,
    scales,
    bias,
    out,
    rows,
    batch,
    splits,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The parts of a product added in their order, then scale and bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1).to(tl.int64)
    inside = row < rows
    acc = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        acc += tl.load(partial + (split * batch + sample) * rows + row, mask=inside, other=0.0)
    if SCALED:
        acc *= tl.load(scales + row, mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + sample * rows + row, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather(
    x,
    values,
    index,
    scales,
    bias,
    out,
    partial,
    rows,
    columns,
    batch,
    steps,
    entries,
    steps_a_split,
    K: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """A row for each thread, which reads 16 bytes of its values at a time and gathers x; ``x`` is [columns, SAMPLES].

    The 32 lanes of a warp are in the same block at the same time: their gathers fall into few cache lines.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    group = row // V
    e = tl.arange(0, CHUNK)
    sample = tl.arange(0, SAMPLES)
    values_row = (row // 32 * steps * 32 + row % 32) * CHUNK
    index_row = (group // 32 * steps * 32 + group % 32) * CHUNK
    inside = row < rows
    acc = tl.zeros([ROWS, SAMPLES], tl.float32)
    first = split * steps_a_split
    last = tl.minimum(first + steps_a_split, steps)
    for start in range(first, last, UNROLL):
        for u in tl.static_range(UNROLL):
            step = start + u
            there = (inside & (step < last))[:, None]
            value = tl.load(values + (values_row + step * 32 * CHUNK)[:, None] + e[None, :], mask=there, other=0.0)
            place = index_row + step * 32 * CHUNK
            if NIBBLES:  # whole chunks are loaded and then taken apart
                half = tl.arange(0, CHUNK // 2)
                byte = tl.load(index + (place // 2)[:, None] + half[None, :], mask=there, other=0).to(tl.int32)
                kept = tl.reshape(tl.join(byte & 15, byte >> 4), [ROWS, CHUNK])
            else:
                kept = tl.load(index + place[:, None] + e[None, :], mask=there, other=0).to(tl.int32)
            entry = step * CHUNK + e
            column = (entry // K * B)[None, :] + kept
            # Entries that fill up have the value zero; x is not read for them, because it may be infinite.
            live = there & (entry < entries)[None, :] & (column < columns)
            if SAMPLES == 1:
                gathered = tl.load(x + column, mask=live, other=0.0).to(tl.float32)
                acc += tl.sum(value.to(tl.float32) * gathered, 1)[:, None]
            else:
                where = x + (column * SAMPLES)[:, :, None] + sample[None, None, :]
                gathered = tl.load(where, mask=live[:, :, None], other=0.0).to(tl.float32)
                acc += tl.sum(value.to(tl.float32)[:, :, None] * gathered, 1)
    _finish(acc, row, sample, split, scales, bias, out, partial, rows, batch, SPLIT, SCALED, BIAS)


@triton.jit
def _decompress(
    x,
    values,
    index,
    scales,
    bias,
    out,
    partial,
    rows,
    columns,
    batch,
    steps,
    blocks,
    blocks_a_split,
    x_stride,
    K: tl.constexpr,
    B: tl.constexpr,
    PADDED_B: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    NIBBLES: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """A dense tile of ROWS x BLOCKS blocks is made by k comparisons an element, and multiplied; ``x`` is [batch, columns].

    WIDE: the values do not fit into the type of x without loss, so float32 is multiplied.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    group = row // V
    sample = tl.program_id(2) * SAMPLES + tl.arange(0, SAMPLES)
    values_row = (row // 32 * steps * 32 + row % 32) * CHUNK
    index_row = (group // 32 * steps * 32 + group % 32) * CHUNK
    inside = row < rows
    position = tl.arange(0, PADDED_B)
    flat = tl.arange(0, BLOCKS * PADDED_B)
    x_row = x + sample.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros([ROWS, SAMPLES], tl.float32)
    first = split * blocks_a_split
    last = tl.minimum(first + blocks_a_split, blocks)
    for start in range(first, last, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        there = inside[:, None] & (block < last)[None, :]
        dense = tl.zeros([ROWS, BLOCKS, PADDED_B], values.dtype.element_ty)
        for j in range(K):
            entry = block * K + j
            chunk = (entry // CHUNK * (32 * CHUNK))[None, :]
            e = (entry % CHUNK)[None, :]
            value = tl.load(values + values_row[:, None] + chunk + e, mask=there, other=0.0)
            kept = _entries(index, index_row[:, None] + chunk, e, there, NIBBLES)
            dense = tl.where(position[None, None, :] == kept[:, :, None], value[:, :, None], dense)
        weight = tl.reshape(dense, [ROWS, BLOCKS * PADDED_B])
        at = start + flat // PADDED_B
        column = at * B + flat % PADDED_B
        live = (flat % PADDED_B < B) & (at < last) & (column < columns)
        by_column = tl.load(x_row + column[:, None], mask=live[:, None] & (sample < batch)[None, :], other=0.0)
        if WIDE:
            acc += tl.dot(weight.to(tl.float32), by_column.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(weight.to(x.dtype.element_ty), by_column, input_precision="ieee")
    _finish(acc, row, sample, split, scales, bias, out, partial, rows, batch, SPLIT, SCALED, BIAS)


@triton.jit
def _vector(
    x,
    values,
    index,
    scales,
    bias,
    out,
    partial,
    rows,
    columns,
    batch,
    steps,
    entries,
    steps_a_split,
    x_stride,
    K: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    NIBBLES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """V rows that share their choice: the rows of ``x`` [columns, x_stride] that they keep are gathered, the product is dense."""
    group = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = group * V + tl.arange(0, V)
    sample = tl.program_id(2) * SAMPLES + tl.arange(0, SAMPLES)
    values_row = (row // 32 * steps * 32 + row % 32) * CHUNK
    index_group = (group // 32 * steps * 32 + group % 32) * CHUNK
    acc = tl.zeros([V, SAMPLES], tl.float32)
    first = split * steps_a_split
    last = tl.minimum(first + steps_a_split, steps)
    flat = tl.arange(0, ENTRIES)
    for start in range(first, last, ENTRIES // CHUNK):
        # Masked by whole chunks, so that the compiler loads them at once; what fills the last one up is zero.
        step = start + flat // CHUNK
        there = step < last
        place = step * (32 * CHUNK)
        e = flat % CHUNK
        entry = step * CHUNK + e
        column = entry // K * B + _entries(index, index_group + place, e, there, NIBBLES)
        live = there & (entry < entries) & (column < columns)
        value = tl.load(
            values + (values_row[:, None] + place[None, :] + e[None, :]),
            mask=(row < rows)[:, None] & there[None, :],
            other=0.0,
        )
        # Columns of x_stride beyond the batch are zeros, so that whole vectors are loaded.
        gathered = tl.load(
            x + column.to(tl.int64)[:, None] * x_stride + sample[None, :],
            mask=live[:, None] & (sample < x_stride)[None, :],
            other=0.0,
        )
        if WIDE:
            acc += tl.dot(value.to(tl.float32), gathered.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(value.to(x.dtype.element_ty), gathered, input_precision="ieee")
    _finish(acc, row, sample, split, scales, bias, out, partial, rows, batch, SPLIT, SCALED, BIAS)
