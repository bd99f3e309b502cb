// The inner loops of paged attention for one instruction set. paged_attention_impl.h includes this file once per
// instruction set (so there is no include guard), each time inside its own namespace and with the macros of vector_isa.h set,
// and SEXTANT_VEC_REGS: the accumulator registers that a loop may keep.

#include "simd/csrc/vector_isa.h"

// Scores of R query rows against NB consecutive blocks; one FMA chain over head_dim for each position.
template <typename KV, int R, int NB>
SEXTANT_VEC_INLINE void score_blocks(const float* q, int64_t dim, const KV* k, int64_t block_stride, const int32_t* table,
                                    int64_t block, int64_t last_block, const int32_t* limit, float* s, int64_t s_stride,
                                    vf (&top)[R]) {
  const KV* base[NB];
  for (int b = 0; b < NB; ++b) base[b] = k + table[block + b] * block_stride;
  // The next group's blocks lie anywhere in the pool: the hardware prefetcher cannot know them.
  const KV* next[NB];
  for (int b = 0; b < NB; ++b) next[b] = block + NB + b < last_block ? k + table[block + NB + b] * block_stride : base[b];
  vf acc[R][NB][VPB];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b)
#pragma GCC unroll 8
      for (int i = 0; i < VPB; ++i) acc[r][b][i] = vf{};
  for (int64_t d = 0; d < dim; ++d) {
    vf key[NB][VPB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
      if (sizeof(KV) == 4 || d % 2 == 0) __builtin_prefetch(next[b] + d * 16, 0, 2);  // into L2: lines of 64 bytes
#pragma GCC unroll 8
      for (int i = 0; i < VPB; ++i) key[b][i] = load(base[b] + d * 16 + i * W);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = splat(q[r * dim + d]);
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b)
#pragma GCC unroll 8
        for (int i = 0; i < VPB; ++i) acc[r][b][i] = SEXTANT_VEC_FMA(x, key[b][i], acc[r][b][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
      const int32_t first = static_cast<int32_t>((block + b) * 16);
#pragma GCC unroll 8
      for (int i = 0; i < VPB; ++i) {
        vf x = acc[r][b][i];
        if (first + 16 > limit[r]) x = lanes(first + i * W) < limit[r] ? x : splat(-__builtin_inff());
        top[r] = x > top[r] ? x : top[r];
        store(s + r * s_stride + first + i * W, x);
      }
    }
}

// Scores s[r][position] of blocks lo ... hi - 1 (-inf from limit[r] on); row_max[r] is raised to their maximum.
template <typename KV, int R>
void scores(const float* q, int64_t dim, const KV* k, int64_t block_stride, const int32_t* table, int64_t lo, int64_t hi,
            const int32_t* limit, float* s, int64_t s_stride, float* row_max) {
  vf top[R];
  for (int r = 0; r < R; ++r) top[r] = splat(row_max[r]);
  constexpr int kFit = SEXTANT_VEC_REGS / (R * VPB);
  constexpr int NB = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  int64_t b = lo;
  for (; b + NB <= hi; b += NB)
    score_blocks<KV, R, NB>(q, dim, k, block_stride, table, b, hi, limit, s, s_stride, top);
  for (; b < hi; ++b) score_blocks<KV, R, 1>(q, dim, k, block_stride, table, b, hi, limit, s, s_stride, top);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < W; ++i) row_max[r] = top[r][i] > row_max[r] ? top[r][i] : row_max[r];
}

// p = exp(s - max) over `blocks` blocks (p may be s); returns the sum: one chain per lane, then a fixed tree.
inline float exponentiate(const float* s, float* p, int64_t blocks, float max) {
  vf sum[VPB];
  for (int i = 0; i < VPB; ++i) sum[i] = vf{};
  for (int64_t b = 0; b < blocks; ++b)
#pragma GCC unroll 8
    for (int i = 0; i < VPB; ++i) {
      const vf e = exp_nonpositive(load(s + b * 16 + i * W) - max);
      sum[i] += e;
      store(p + b * 16 + i * W, e);
    }
  float lane[16];
  for (int i = 0; i < VPB; ++i) store(lane + i * W, sum[i]);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  return lane[0];
}

// out[r][0 ... 16 ND) = sum over positions < limit[r] of p[r][position] * V, one FMA chain in position order, / sum[r].
template <typename KV, int R, int ND>
SEXTANT_VEC_INLINE void weigh_columns(const float* p, int64_t p_stride, const KV* v, int64_t dim, int64_t block_stride,
                                     const int32_t* table, const int32_t* limit, const float* sum, float* const* out,
                                     int64_t column) {
  constexpr int NV = ND * VPB;
  vf acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) acc[r][i] = vf{};
  int32_t common = limit[0];
  int32_t longest = limit[0];
  for (int r = 1; r < R; ++r) {
    common = limit[r] < common ? limit[r] : common;
    longest = limit[r] > longest ? limit[r] : longest;
  }
  const int64_t blocks = (common + 15) / 16;
  constexpr int64_t kAhead = 8 / sizeof(KV);  // about 8 KiB ahead: less leaves memory idle, more leaves L2
  for (int64_t b = 0; b < blocks; ++b) {
    const KV* row = v + table[b] * block_stride + column;
    const KV* next = b + kAhead < blocks ? v + table[b + kAhead] * block_stride + column : row;
    const int count = common - b * 16 < 16 ? static_cast<int>(common - b * 16) : 16;
    const float* weight = p + b * 16;
    for (int j = 0; j < count; ++j) {
      vf x[NV];
#pragma GCC unroll 8
      for (int c = 0; c < ND * 16; c += 64 / static_cast<int>(sizeof(KV))) __builtin_prefetch(next + j * dim + c, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) x[i] = load(row + j * dim + i * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf w = splat(weight[r * p_stride + j]);
#pragma GCC unroll 16
        for (int i = 0; i < NV; ++i) acc[r][i] = SEXTANT_VEC_FMA(w, x[i], acc[r][i]);
      }
    }
  }
  // Positions that only the later rows of the tile see. A row never touches a value beyond its own position.
  if (longest > common) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int32_t position = common; position < limit[r]; ++position) {
        const KV* row = v + table[position / 16] * block_stride + position % 16 * dim + column;
        const vf w = splat(p[r * p_stride + position]);
#pragma GCC unroll 16
        for (int i = 0; i < NV; ++i) acc[r][i] = SEXTANT_VEC_FMA(w, load(row + i * W), acc[r][i]);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) store(out[r] + column + i * W, acc[r][i] / sum[r]);
}

// Columns lo ... hi - 1 (multiples of 16) of the R output rows.
template <typename KV, int R>
void weigh(const float* p, int64_t p_stride, const KV* v, int64_t dim, int64_t block_stride, const int32_t* table,
           const int32_t* limit, const float* sum, float* const* out, int64_t lo, int64_t hi) {
  constexpr int kFit = SEXTANT_VEC_REGS / (R * VPB);
  constexpr int ND = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  int64_t c = lo;
  for (; c + ND * 16 <= hi; c += ND * 16)
    weigh_columns<KV, R, ND>(p, p_stride, v, dim, block_stride, table, limit, sum, out, c);
  for (; c < hi; c += 16) weigh_columns<KV, R, 1>(p, p_stride, v, dim, block_stride, table, limit, sum, out, c);
}

// The same loops for a number of rows known at run time (1 ... 6): what the dispatch table points to.
template <typename KV>
void scores_any(int rows, const float* q, int64_t dim, const KV* k, int64_t block_stride, const int32_t* table,
                int64_t lo, int64_t hi, const int32_t* limit, float* s, int64_t s_stride, float* row_max) {
  switch (rows) {
    case 1: return scores<KV, 1>(q, dim, k, block_stride, table, lo, hi, limit, s, s_stride, row_max);
    case 2: return scores<KV, 2>(q, dim, k, block_stride, table, lo, hi, limit, s, s_stride, row_max);
    case 3: return scores<KV, 3>(q, dim, k, block_stride, table, lo, hi, limit, s, s_stride, row_max);
    case 4: return scores<KV, 4>(q, dim, k, block_stride, table, lo, hi, limit, s, s_stride, row_max);
    case 5: return scores<KV, 5>(q, dim, k, block_stride, table, lo, hi, limit, s, s_stride, row_max);
    default: return scores<KV, 6>(q, dim, k, block_stride, table, lo, hi, limit, s, s_stride, row_max);
  }
}

template <typename KV>
void weigh_any(int rows, const float* p, int64_t p_stride, const KV* v, int64_t dim, int64_t block_stride,
               const int32_t* table, const int32_t* limit, const float* sum, float* const* out, int64_t lo, int64_t hi) {
  switch (rows) {
    case 1: return weigh<KV, 1>(p, p_stride, v, dim, block_stride, table, limit, sum, out, lo, hi);
    case 2: return weigh<KV, 2>(p, p_stride, v, dim, block_stride, table, limit, sum, out, lo, hi);
    case 3: return weigh<KV, 3>(p, p_stride, v, dim, block_stride, table, limit, sum, out, lo, hi);
    case 4: return weigh<KV, 4>(p, p_stride, v, dim, block_stride, table, limit, sum, out, lo, hi);
    case 5: return weigh<KV, 5>(p, p_stride, v, dim, block_stride, table, limit, sum, out, lo, hi);
    default: return weigh<KV, 6>(p, p_stride, v, dim, block_stride, table, limit, sum, out, lo, hi);
  }
}
