// The inner loops of the packed linear for one instruction set; vector_dispatch.h includes this file once for each (so there is
// no include guard). Panels hold 32 output columns: fp32 [k][32], bf16 [k/2][32][2], int8 [k/4][32][4]. Every output is one
// chain over k in ascending order, so rows, tiles and threads cannot change its bits.
#include "simd/csrc/vector_isa.h"

SEXTANT_VEC_INLINE vi load_int(const int32_t* p) { return reinterpret_cast<vi>(load(reinterpret_cast<const float*>(p))); }

// out[r][c] = sum_k x[r][k] * w[k][c] for R rows and the NV * W columns from `w` on.
template <int R, int NV>
SEXTANT_VEC_INLINE void tile_f32(const float* x, int64_t xs, const float* w, int64_t k, float* out) {
  vf acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) acc[r][i] = vf{};
  for (int64_t j = 0; j < k; ++j) {
    vf weight[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) weight[i] = load(w + j * 32 + i * W);
    if (R == 1) {
      __builtin_prefetch(w + j * 32 + 1024);
      __builtin_prefetch(w + j * 32 + 1024 + 16);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf value = splat(x[r * xs + j]);
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) acc[r][i] = SEXTANT_VEC_FMA(value, weight[i], acc[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) store(out + r * 32 + i * W, acc[r][i]);
}

// The same for bf16 weights in pairs, without a bf16 instruction: x holds floats that were rounded to bf16.
template <int R, int NV>
SEXTANT_VEC_INLINE void tile_bf16(const float* x, int64_t xs, const uint16_t* w, int64_t k, float* out) {
  vf acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) acc[r][i] = vf{};
  for (int64_t j = 0; j < k / 2; ++j) {
    vf low[NV], high[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) {
      const vu pair = reinterpret_cast<vu>(load(reinterpret_cast<const float*>(w + j * 64 + i * 2 * W)));
      low[i] = reinterpret_cast<vf>(pair << 16);
      high[i] = reinterpret_cast<vf>(pair & 0xffff0000u);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf even = splat(x[r * xs + 2 * j]), odd = splat(x[r * xs + 2 * j + 1]);
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) {
        acc[r][i] = SEXTANT_VEC_FMA(even, low[i], acc[r][i]);
        acc[r][i] = SEXTANT_VEC_FMA(odd, high[i], acc[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) store(out + r * 32 + i * W, acc[r][i]);
}

// Exact integer sums of u8 activations and s8 weights, in quads, without VNNI.
template <int R, int NV>
SEXTANT_VEC_INLINE void tile_int8(const uint8_t* x, int64_t xs, const int8_t* w, int64_t k, int32_t* out) {
  vi acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) acc[r][i] = vi{};
  for (int64_t j = 0; j < k / 4; ++j) {
    vi quad[NV];
    for (int i = 0; i < NV; ++i) quad[i] = reinterpret_cast<vi>(load(reinterpret_cast<const float*>(w + j * 128 + i * 4 * W)));
    for (int r = 0; r < R; ++r) {
      const uint8_t* value = x + r * xs + 4 * j;
      for (int i = 0; i < NV; ++i) {
        acc[r][i] += ((quad[i] << 24) >> 24) * static_cast<int32_t>(value[0]);
        acc[r][i] += ((quad[i] << 16) >> 24) * static_cast<int32_t>(value[1]);
        acc[r][i] += ((quad[i] << 8) >> 24) * static_cast<int32_t>(value[2]);
        acc[r][i] += (quad[i] >> 24) * static_cast<int32_t>(value[3]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) store(reinterpret_cast<float*>(out) + r * 32 + i * W, reinterpret_cast<vf>(acc[r][i]));
}

// Registers decide how many columns a tile of R rows takes at once; a panel of 32 columns is done in 32 / (NV * W) passes.
template <int R>
constexpr int columns() {
  constexpr int fit = SEXTANT_VEC_REGS / R;
  constexpr int all = 32 / W;
  return fit >= all ? all : fit >= 4 && all >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <int R>
inline void panel_f32(const void* x, int64_t xs, const void* w, int64_t k, void* out) {
  constexpr int NV = columns<R>();
  for (int c = 0; c < 32; c += NV * W)
    tile_f32<R, NV>(static_cast<const float*>(x), xs, static_cast<const float*>(w) + c, k, static_cast<float*>(out) + c);
}
template <int R>
inline void panel_bf16(const void* x, int64_t xs, const void* w, int64_t k, void* out) {
  constexpr int NV = columns<2 * R>();
  for (int c = 0; c < 32; c += NV * W)
    tile_bf16<R, NV>(static_cast<const float*>(x), xs, static_cast<const uint16_t*>(w) + 2 * c, k, static_cast<float*>(out) + c);
}
template <int R>
inline void panel_int8(const void* x, int64_t xs, const void* w, int64_t k, void* out) {
  constexpr int NV = columns<2 * R>();
  for (int c = 0; c < 32; c += NV * W)
    tile_int8<R, NV>(static_cast<const uint8_t*>(x), xs, static_cast<const int8_t*>(w) + 4 * c, k, static_cast<int32_t*>(out) + c);
}

constexpr int kTileRows = SEXTANT_VEC_REGS >= 24 ? 12 : 6;

// y[r][0 ... n) = sums (+ bias) (+ y): the end of a panel for `rows` rows. A whole panel goes in vectors.
inline void finish_f32(const float* acc, int rows, int n, float* y, int64_t ys, const float* bias, bool accumulate) {
  for (int r = 0; r < rows; ++r) {
    const float* from = acc + r * 32;
    float* to = y + r * ys;
    int c = 0;
    if (n == 32)
      for (; c < 32; c += W) {
        vf value = load(from + c);
        if (bias) value += load(bias + c);
        store(to + c, accumulate ? load(to + c) + value : value);
      }
    for (; c < n; ++c) {
      float value = from[c];
      if (bias) value += bias[c];
      to[c] = accumulate ? to[c] + value : value;
    }
  }
}
// The same for exact integer sums of unsigned activations: y = (sum - offset) * (row scale * column scale) (+ bias) (+ y).
inline void finish_int8(const int32_t* acc, int rows, int n, float* y, int64_t ys, const float* bias, bool accumulate,
                        const float* row_scales, const float* column_scales, const int32_t* offsets) {
  for (int r = 0; r < rows; ++r) {
    const int32_t* from = acc + r * 32;
    float* to = y + r * ys;
    int c = 0;
    if (n == 32)
      for (; c < 32; c += W) {
        const vi sum = load_int(from + c) - load_int(offsets + c);
        vf value = __builtin_convertvector(sum, vf) * (row_scales[r] * load(column_scales + c));
        if (bias) value += load(bias + c);
        store(to + c, accumulate ? load(to + c) + value : value);
      }
    for (; c < n; ++c) {
      float value = static_cast<float>(from[c] - offsets[c]) * (row_scales[r] * column_scales[c]);
      if (bias) value += bias[c];
      to[c] = accumulate ? to[c] + value : value;
    }
  }
}

// A row as bf16, rounded to nearest even: as numbers (bf16 instructions) or as floats that hold them.
SEXTANT_VEC_INLINE vu round_bf16(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}
inline void row_to_bf16_floats(const float* x, int64_t k, float* out) {
  int64_t j = 0;
  for (; j + W <= k; j += W) store(out + j, reinterpret_cast<vf>(round_bf16(load(x + j))));
  for (; j < k; ++j) {
    float lane[W] = {x[j]};
    store(lane, reinterpret_cast<vf>(round_bf16(load(lane))));
    out[j] = lane[0];
  }
}
inline void row_to_bf16(const float* x, int64_t k, uint16_t* out) {
  int64_t j = 0;
  for (; j + W <= k; j += W)
    *reinterpret_cast<vh*>(out + j) = __builtin_convertvector(round_bf16(load(x + j)) >> 16, vh);
  for (; j < k; ++j) {
    float lane[W] = {x[j]};
    out[j] = static_cast<uint16_t>(round_bf16(load(lane))[0] >> 16);
  }
}

// A row as u8 = round(x / scale) + 128 with scale = max |x| / 127; returns the scale.
inline float row_to_int8(const float* x, int64_t k, uint8_t* out) {
  typedef uint8_t vb __attribute__((vector_size(SEXTANT_VEC_W), aligned(1), may_alias));
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
  vf top{};
  float rest = 0.0f;
  int64_t j = 0;
  for (; j + W <= k; j += W) {
    const vf a = reinterpret_cast<vf>(reinterpret_cast<vu>(load(x + j)) & 0x7fffffffu);
    top = a > top ? a : top;
  }
  for (; j < k; ++j) rest = __builtin_fabsf(x[j]) > rest ? __builtin_fabsf(x[j]) : rest;
  for (int i = 0; i < W; ++i) rest = top[i] > rest ? top[i] : rest;
  const float inverse = rest > 0.0f ? 127.0f / rest : 0.0f;
  for (j = 0; j + W <= k; j += W) {
    const vf t = load(x + j) * inverse + kMagic;
    *reinterpret_cast<vb*>(out + j) = __builtin_convertvector(reinterpret_cast<vu>(t) - (0x4B400000u - 128u), vb);
  }
  for (; j < k; ++j) {
    const float t = x[j] * inverse + kMagic;
    uint32_t bits;
    __builtin_memcpy(&bits, &t, 4);
    out[j] = static_cast<uint8_t>(bits - (0x4B400000u - 128u));
  }
  return rest / 127.0f;
}

using Panel = void (*)(const void*, int64_t, const void*, int64_t, void*);

template <int... R>
struct Tiles {
  static constexpr Panel f32[] = {nullptr, panel_f32<R>...};
  static constexpr Panel bf16[] = {nullptr, panel_bf16<R>...};
  static constexpr Panel int8[] = {nullptr, panel_int8<R>...};
};
#if SEXTANT_VEC_W == 16
using Table = Tiles<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>;
#else
using Table = Tiles<1, 2, 3, 4, 5, 6>;
#endif
