// Panels with AVX512-BF16 (vdpbf16ps) and AVX512-VNNI (vpdpbusd): one instruction does two or four steps of k for 16 columns.
// The bits of vdpbf16ps differ from those of two FMAs (it keeps odd and even products apart), so numerics() names the path.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstdint>

namespace sextant::linear_detail {
namespace {

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma")
#endif

template <int R>
inline void panel_dpbf16(const void* x_, int64_t xs, const void* w_, int64_t k, void* out_) {
  const uint16_t* x = static_cast<const uint16_t*>(x_);
  const char* w = static_cast<const char*>(w_);
  float* out = static_cast<float*>(out_);
  __m512 acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < k / 2; ++j) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(w + j * 128);
    const __m512bh high = (__m512bh)_mm512_loadu_si512(w + j * 128 + 64);
    if (R == 1) {
      _mm_prefetch(w + j * 128 + 4096, _MM_HINT_T0);
      _mm_prefetch(w + j * 128 + 4096 + 64, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, x + r * xs + 2 * j, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, value);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, value);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * 32, acc[r][0]);
    _mm512_storeu_ps(out + r * 32 + 16, acc[r][1]);
  }
}

template <int R>
inline void panel_vnni(const void* x_, int64_t xs, const void* w_, int64_t k, void* out_) {
  const uint8_t* x = static_cast<const uint8_t*>(x_);
  const char* w = static_cast<const char*>(w_);
  int32_t* out = static_cast<int32_t*>(out_);
  __m512i acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  for (int64_t j = 0; j < k / 4; ++j) {
    const __m512i low = _mm512_loadu_si512(w + j * 128);
    const __m512i high = _mm512_loadu_si512(w + j * 128 + 64);
    if (R == 1) {
      _mm_prefetch(w + j * 128 + 4096, _MM_HINT_T0);
      _mm_prefetch(w + j * 128 + 4096 + 64, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, x + r * xs + 4 * j, 4);
      const __m512i value = _mm512_set1_epi32(quad);
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], value, low);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], value, high);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_si512(out + r * 32, acc[r][0]);
    _mm512_storeu_si512(out + r * 32 + 16, acc[r][1]);
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

using PanelX86 = void (*)(const void*, int64_t, const void*, int64_t, void*);
template <int... R>
struct TilesX86 {
  static constexpr PanelX86 dpbf16[] = {nullptr, panel_dpbf16<R>...};
  static constexpr PanelX86 vnni[] = {nullptr, panel_vnni<R>...};
};
using TableX86 = TilesX86<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>;

}  // namespace
}  // namespace sextant::linear_detail
#endif
