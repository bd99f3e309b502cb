// The vector loops of sampling for one instruction set; included once per instruction set by sample_row.cpp (no include
// guard) with the macros of vector_isa.h set. A row of logits is seen in superblocks of 1,024 tokens; lane j of a
// superblock is its group j: the 64 tokens j, j + 16, j + 32, ... Whatever the instruction set, there are 16 lanes.

#include "simd/csrc/vector_isa.h"

// Maximum of each group into groups[16 * superblocks] (-inf for an empty one). False if some logit is NaN or +inf.
inline bool group_maxima(const float* x, int64_t n, float* groups) {
  vi bad[VPB] = {};
  bool tail_ok = true;
  for (int64_t first = 0; first < n; first += 1024) {
    const int64_t size = n - first < 1024 ? n - first : 1024;
    vf top[VPB];
    for (int i = 0; i < VPB; ++i) top[i] = splat(-__builtin_inff());
    for (int64_t j = 0; j + 16 <= size; j += 16)
#pragma GCC unroll 8
      for (int i = 0; i < VPB; ++i) {
        const vf v = load(x + first + j + i * W);
        top[i] = v > top[i] ? v : top[i];
        bad[i] |= ~(v <= splat(3.402823466e38f));
      }
    float* lane = groups + first / 64;
    for (int i = 0; i < VPB; ++i) store(lane + i * W, top[i]);
    for (int64_t j = size / 16 * 16; j < size; ++j) {
      const float v = x[first + j];
      lane[j % 16] = v > lane[j % 16] ? v : lane[j % 16];
      tail_ok = tail_ok && v <= 3.402823466e38f;
    }
  }
  int32_t any = 0;
  for (int i = 0; i < VPB; ++i)
    for (int l = 0; l < W; ++l) any |= bad[i][l];
  return any == 0 && tail_ok;
}

SEXTANT_VEC_INLINE vf weight(vf x, vi id, const Weigher& w) {
  const vf z = (x - w.max) * w.inverse_temperature;
  const vi keep = (z >= splat(w.z_min)) & ((x > splat(w.x_min)) | ((x == splat(w.x_min)) & (id <= w.last_id)));
  return keep ? exp_nonpositive(z) : vf{};
}

// Weights of `count` tokens whose ids start at `first`.
inline void weights(const float* x, int64_t count, int64_t first, const Weigher& w, float* out) {
  int64_t j = 0;
  for (; j + W <= count; j += W) store(out + j, weight(load(x + j), lanes(static_cast<int32_t>(first + j)), w));
  if (j < count) {
    float in[W] = {}, rest[W];
    for (int64_t l = j; l < count; ++l) in[l - j] = x[l];
    store(rest, weight(load(in), lanes(static_cast<int32_t>(first + j)), w));
    for (int64_t l = j; l < count; ++l) out[l] = rest[l - j];
  }
}

// Sum of the weights of each superblock into sums; returns their total. Lanes are float over 64 tokens, then double.
inline double superblock_sums(const float* x, int64_t n, const Weigher& w, double* sums) {
  double total = 0;
  for (int64_t first = 0; first < n; first += 1024) {
    const int64_t size = n - first < 1024 ? n - first : 1024;
    vf sum[VPB] = {};
    vi id[VPB];
    for (int i = 0; i < VPB; ++i) id[i] = lanes(static_cast<int32_t>(first) + i * W);
    for (int64_t j = 0; j + 16 <= size; j += 16)
#pragma GCC unroll 8
      for (int i = 0; i < VPB; ++i) {
        sum[i] += weight(load(x + first + j + i * W), id[i], w);
        id[i] += 16;
      }
    float lane[16], rest[16] = {};
    for (int i = 0; i < VPB; ++i) store(lane + i * W, sum[i]);
    const int64_t whole = size / 16 * 16;
    if (whole < size) weights(x + first + whole, size - whole, first + whole, w, rest);
    double s = 0;
    for (int l = 0; l < 16; ++l) s += static_cast<double>(lane[l]) + static_cast<double>(rest[l]);
    sums[first / 1024] = s;
    total += s;
  }
  return total;
}

// Weight of the tokens at most reach[l] below the maximum (in units of z), for each of kReaches, into sums.
inline void reach_sums(const float* x, int64_t n, const Weigher& w, const float* reach, double* sums) {
  for (int l = 0; l < kReaches; ++l) sums[l] = 0;
  for (int64_t first = 0; first < n; first += 1024) {
    const int64_t size = n - first < 1024 ? n - first : 1024;
    vf sum[kReaches] = {};
    int64_t j = 0;
    for (; j + W <= size; j += W) {
      const vf z = (load(x + first + j) - w.max) * w.inverse_temperature;
      const vf e = z >= splat(w.z_min) ? exp_nonpositive(z) : vf{};
#pragma GCC unroll 16
      for (int l = 0; l < kReaches; ++l) sum[l] += z >= splat(-reach[l]) ? e : vf{};
    }
    for (int l = 0; l < kReaches; ++l)
      for (int i = 0; i < W; ++i) sums[l] += static_cast<double>(sum[l][i]);
    if (j < size) {
      float rest[W];
      weights(x + first + j, size - j, first + j, w, rest);
      for (int64_t i = j; i < size; ++i)
        for (int l = 0; l < kReaches; ++l)
          if ((x[first + i] - w.max) * w.inverse_temperature >= -reach[l]) sums[l] += static_cast<double>(rest[i - j]);
    }
  }
}
