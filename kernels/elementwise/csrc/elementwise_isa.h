// Row operations of a decoder layer for one instruction set; vector_dispatch.h includes this file once for each. Sums run in
// sixteen lanes (index % 16) and a fixed tree, so every instruction set with an FMA gives the same bits.
#include "simd/csrc/vector_isa.h"

// out = x / sqrt(mean(x^2) + eps) * weight
inline void rms_norm_row(const float* x, const float* weight, int64_t n, float eps, float* out) {
  vf sum[VPB];
  for (int i = 0; i < VPB; ++i) sum[i] = vf{};
  int64_t j = 0;
  for (; j + 16 <= n; j += 16)
    for (int i = 0; i < VPB; ++i) {
      const vf value = load(x + j + i * W);
      sum[i] = SEXTANT_VEC_FMA(value, value, sum[i]);
    }
  float lane[16];
  for (int i = 0; i < VPB; ++i) store(lane + i * W, sum[i]);
  for (int64_t i = j; i < n; ++i) lane[i - j] += x[i] * x[i];
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  const float factor = 1.0f / __builtin_sqrtf(lane[0] / static_cast<float>(n) + eps);
  for (j = 0; j + W <= n; j += W) store(out + j, load(x + j) * factor * load(weight + j));
  for (; j < n; ++j) out[j] = x[j] * factor * weight[j];
}

SEXTANT_VEC_INLINE vf silu(vf x) {
  const vf e = exp_nonpositive(reinterpret_cast<vf>(reinterpret_cast<vu>(x) | 0x80000000u));  // exp(-|x|)
  const vf top = x < vf{} ? e : splat(1.0f);
  return x * (top / (e + 1.0f));
}
// out = silu(gate) * up, silu(x) = x / (1 + exp(-x))
inline void silu_mul_row(const float* gate, const float* up, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store(out + j, silu(load(gate + j)) * load(up + j));
  if (j < n) {
    float lane[W] = {};
    for (int64_t i = j; i < n; ++i) lane[i - j] = gate[i];
    store(lane, silu(load(lane)));
    for (int64_t i = j; i < n; ++i) out[i] = lane[i - j] * up[i];
  }
}

// Rotates one head in place by its position's angles: cosine[i], sine[i] for i < dim / 2. Interleaved pairs (2i, 2i + 1) or
// halves (i, i + dim / 2).
inline void rope_head(float* x, const float* cosine, const float* sine, int64_t dim, bool interleaved) {
  const int64_t half = dim / 2;
  const int64_t step = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + partner];
    x[i * step] = a * cosine[i] - b * sine[i];
    x[i * step + partner] = b * cosine[i] + a * sine[i];
  }
}
