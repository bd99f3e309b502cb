// The product with a balanced weight on AVX2: 16 rows are two registers. Tiles of 16 columns are permuted, wider ones gathered.
// Included once, under a target pragma: intrinsics only. The chain of every output is that of the AVX-512 path: equal bits.

namespace avx2 {

struct F32 {
  static constexpr int bytes = 4;
  SEXTANT_INLINE __m256 load(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
struct Bf16 {
  static constexpr int bytes = 2;
  SEXTANT_INLINE __m256 load(const char* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};
struct F16 {
  static constexpr int bytes = 2;
  SEXTANT_INLINE __m256 load(const char* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};
struct Int8 {
  static constexpr int bytes = 1;
  SEXTANT_INLINE __m256 load(const char* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

// REGISTERS as in the AVX-512 path: 1 is a tile of at most 16 columns.
template <int REGISTERS>
SEXTANT_INLINE __m256 pick(const float* x, __m256i where) {
  if constexpr (REGISTERS == 1) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), where);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), where);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(where, 28)));
  }
  return _mm256_i32gather_ps(x, where, 4);
}

// Positions of 8 of the 16 lanes, entry after entry.
template <BalancedIndex KIND>
struct Walk;
template <>
struct Walk<BalancedIndex::kByte> {
  const char* at;
  SEXTANT_INLINE void tile(Walk&) {}
  SEXTANT_INLINE __m256i next(Walk& walk) {
    const __m256i where = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(walk.at)));
    walk.at += kLanes;
    return where;
  }
};
template <>
struct Walk<BalancedIndex::kNibble> {
  const char* at;
  int odd = 0;
  SEXTANT_INLINE void tile(Walk&) {}
  SEXTANT_INLINE __m256i next(Walk& walk) {
    const __m256i pair = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(walk.at)));
    const __m256i where = _mm256_and_si256(_mm256_srl_epi32(pair, _mm_cvtsi32_si128(4 * walk.odd)), _mm256_set1_epi32(15));
    walk.at += kLanes * walk.odd;
    walk.odd ^= 1;
    return where;
  }
};
template <>
struct Walk<BalancedIndex::kBitmap> {
  const char* at;
  __m256i left;
  SEXTANT_INLINE void tile(Walk& walk) {
    walk.left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(walk.at));
    walk.at += kLanes * 4;
  }
  // The exponent of the lowest set bit as a float is its position; bit 31 converts to -2^31, whose sign bit `& 31` removes.
  SEXTANT_INLINE __m256i next(Walk& walk) {
    const __m256i less = _mm256_add_epi32(walk.left, _mm256_set1_epi32(-1));
    const __m256i lowest = _mm256_andnot_si256(less, walk.left);
    walk.left = _mm256_and_si256(walk.left, less);
    const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(lowest)), 23);
    return _mm256_and_si256(_mm256_add_epi32(exponent, _mm256_set1_epi32(1)), _mm256_set1_epi32(31));
  }
};

template <typename Value, BalancedIndex KIND, int REGISTERS, int M, int G>
static void product(const BalancedLanes& w, const float* x, int64_t x_stride, int64_t group, float* out) {
  for (int half = 0; half < 2; ++half) {
    __m256 sum[M][G];
    Walk<KIND> walk[G];
    const char* values[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      walk[g].at = w.index + (group + g) * w.index_stride() + half * (KIND == BalancedIndex::kBitmap ? 32 : 8);
      values[g] = w.values + (group + g) * w.values_stride() + half * 8 * Value::bytes;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][g] = _mm256_setzero_ps();
    }
    const float* tile = x;
    for (int64_t t = 0; t < w.tiles; ++t, tile += w.tile) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) Walk<KIND>::tile(walk[g]);
      for (int64_t j = 0; j < w.per_tile; ++j) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const __m256i where = Walk<KIND>::next(walk[g]);
          const __m256 value = Value::load(values[g]);
          values[g] += kLanes * Value::bytes;
          if (M == 1) _mm_prefetch(values[g] + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            sum[m][g] = _mm256_fmadd_ps(value, pick<REGISTERS>(tile + m * x_stride, where), sum[m][g]);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) _mm256_storeu_ps(out + (m * G + g) * kLanes + half * 8, sum[m][g]);
  }
}

}  // namespace avx2
