// The product with a balanced weight on AVX-512: the tile of x lies in one to sixteen registers and permutations are the gather,
// which even at 256 columns is twice as fast as the hardware's. Included once, under a target pragma: intrinsics only, nothing of the
// standard library. Every output is one chain over its entries in order, whatever the batch and the threads.

namespace avx512 {

#define SEXTANT_INLINE static inline __attribute__((always_inline))

struct F32 {
  static constexpr int bytes = 4;
  SEXTANT_INLINE __m512 load(const char* p) { return _mm512_loadu_ps(p); }
};
struct Bf16 {
  static constexpr int bytes = 2;
  SEXTANT_INLINE __m512 load(const char* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
};
struct F16 {
  static constexpr int bytes = 2;
  SEXTANT_INLINE __m512 load(const char* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
};
struct Int8 {
  static constexpr int bytes = 1;
  SEXTANT_INLINE __m512 load(const char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
};

// The tile of x in 1, 2, 4, 8 or 16 registers (what does not fit stays in the first-level cache).
template <int REGISTERS>
struct Tile {
  __m512 part[REGISTERS];
  SEXTANT_INLINE Tile at(const float* x) {
    Tile tile;
#pragma GCC unroll 16
    for (int i = 0; i < REGISTERS; ++i) tile.part[i] = _mm512_loadu_ps(x + 16 * i);
    return tile;
  }
  SEXTANT_INLINE __m512 pick(const Tile& tile, __m512i where) {
    if constexpr (REGISTERS == 1) {
      return _mm512_permutexvar_ps(where, tile.part[0]);
    } else {
      return pick_of<0, REGISTERS>(tile, where);
    }
  }

 private:
  // Of the registers FIRST ... FIRST + COUNT - 1: pairs by a permutation, pairs of pairs by the next higher bit of the position.
  template <int FIRST, int COUNT>
  SEXTANT_INLINE __m512 pick_of(const Tile& tile, __m512i where) {
    if constexpr (COUNT == 2) {
      return _mm512_permutex2var_ps(tile.part[FIRST], where, tile.part[FIRST + 1]);
    } else {
      const __m512 low = pick_of<FIRST, COUNT / 2>(tile, where);
      const __m512 high = pick_of<FIRST + COUNT / 2, COUNT / 2>(tile, where);
      return _mm512_mask_blend_ps(_mm512_test_epi32_mask(where, _mm512_set1_epi32(COUNT * 8)), low, high);
    }
  }
};

// Yields the positions of one group of 16 rows, entry after entry. Only the bits that a permutation looks at are right.
template <BalancedIndex KIND>
struct Walk;
template <>
struct Walk<BalancedIndex::kByte> {
  const char* at;
  SEXTANT_INLINE void tile(Walk&) {}
  SEXTANT_INLINE __m512i next(Walk& walk) {
    const __m512i where = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(walk.at)));
    walk.at += kLanes;
    return where;
  }
};
template <>
struct Walk<BalancedIndex::kNibble> {
  const char* at;
  int odd = 0;
  SEXTANT_INLINE void tile(Walk&) {}
  SEXTANT_INLINE __m512i next(Walk& walk) {
    const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(walk.at)));
    const __m512i where = _mm512_srl_epi32(pair, _mm_cvtsi32_si128(4 * walk.odd));
    walk.at += kLanes * walk.odd;
    walk.odd ^= 1;
    return where;
  }
};
template <>
struct Walk<BalancedIndex::kBitmap> {
  const char* at;
  __m512i left;
  SEXTANT_INLINE void tile(Walk& walk) {
    walk.left = _mm512_loadu_si512(walk.at);
    walk.at += kLanes * 4;
  }
  // The lowest set bit: 31 minus the leading zeros of it alone.
  SEXTANT_INLINE __m512i next(Walk& walk) {
    const __m512i less = _mm512_add_epi32(walk.left, _mm512_set1_epi32(-1));
    const __m512i lowest = _mm512_andnot_si512(less, walk.left);
    walk.left = _mm512_and_si512(walk.left, less);
    return _mm512_sub_epi32(_mm512_set1_epi32(31), _mm512_lzcnt_epi32(lowest));
  }
};

// out[m][g][16] for M rows of x and the G groups of 16 weight rows from `group` on. G groups at once are as many streams of
// memory, which one core needs to reach the bandwidth of its reads, and as many independent chains.
template <typename Value, BalancedIndex KIND, int REGISTERS, int M, int G>
static void product(const BalancedLanes& w, const float* x, int64_t x_stride, int64_t group, float* out) {
  __m512 sum[M][G];
  Walk<KIND> walk[G];
  const char* values[G];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    walk[g].at = w.index + (group + g) * w.index_stride();
    values[g] = w.values + (group + g) * w.values_stride();
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[m][g] = _mm512_setzero_ps();
  }
  const int64_t per_tile = w.per_tile;
  for (int64_t t = 0; t < w.tiles; ++t, x += w.tile) {
    Tile<REGISTERS> tile[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) tile[m] = Tile<REGISTERS>::at(x + m * x_stride);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) Walk<KIND>::tile(walk[g]);
    for (int64_t j = 0; j < per_tile; ++j) {
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        const __m512i where = Walk<KIND>::next(walk[g]);
        const __m512 value = Value::load(values[g]);
        values[g] += kLanes * Value::bytes;
        if (M == 1) _mm_prefetch(values[g] + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[m][g] = _mm512_fmadd_ps(value, Tile<REGISTERS>::pick(tile[m], where), sum[m][g]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(out + (m * G + g) * kLanes, sum[m][g]);
}

}  // namespace avx512
