// Paged attention on the CPU over plain pointers: writing keys and values into the block pool, and causal attention of
// any mix of prefill chunks and decodes straight from the pool. Included by paged_attention.cpp (torch ops) and by the
// whole-model decoder. Block size is 16 positions.
//
// Pool of one layer, seen from `kv_layer` with `block_stride` elements from one block to the next:
//   block b: K of all heads [kv_heads][head_dim][16] (position fastest), then V of all heads [kv_heads][16][head_dim].
// Rows: token t of q, k, v, out starts at t * its stride (so that they may be slices of a fused qkv row); head h of a
// row at h * head_dim. Sequence s owns tokens query_start[s] ... query_start[s + 1] - 1, which are its last positions:
// the last one has position context_len[s] - 1. Its position p lives in slot p % 16 of block
// block_table[s * table_stride + p / 16].
//
// Bits: a token's result is a function of its own q, its position and the cache contents alone. Every score is one FMA
// chain over head_dim, the softmax sum one chain per lane (position % 16) in position order and a fixed tree over the
// lanes, every output element one FMA chain in position order. Batch, tile, chunk, block permutation and thread count
// change none of these. AVX-512, AVX2 and CPUs with FMA in their base instruction set (aarch64) give equal bits.
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>

namespace sextant {

// Rounds (bf16: to nearest even) and writes k, v [num_tokens][kv_heads * head_dim] to their slots. KV: float or
// c10::BFloat16. Parallel over tokens.
template <typename KV>
void write_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, KV* kv_layer, int64_t block_stride,
              const int32_t* block_table, int64_t table_stride, const int32_t* query_start, const int32_t* context_len,
              int64_t num_seqs, int64_t kv_heads, int64_t head_dim);

// out[t] = softmax(scale * q[t] K^T) V over positions 0 ... position(t), for every token of every sequence.
// head_dim is a multiple of 16; heads a multiple of kv_heads. Parallel over (sequence, kv head, query tile).
template <typename KV>
void paged_attention(const float* q, int64_t q_stride, float* out, int64_t out_stride, const KV* kv_layer,
                     int64_t block_stride, const int32_t* block_table, int64_t table_stride,
                     const int32_t* query_start, const int32_t* context_len, int64_t num_seqs, int64_t heads,
                     int64_t kv_heads, int64_t head_dim, float scale);

}  // namespace sextant

#include "paged_attention_impl.h"
