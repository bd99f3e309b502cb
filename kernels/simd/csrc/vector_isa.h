// Vectors of one instruction set and exp over them: the preamble of the per-instruction-set loops of paged attention and
// sampling. Included inside a namespace of its own for each instruction set (so there is no include guard), with these set:
//   SEXTANT_VEC_W            lanes of a vector (floats)
//   SEXTANT_VEC_FMA(a, b, c) a * b + c, rounded once (twice on the portable path of a CPU without FMA)
// Only GCC vector extensions here: no standard-library inline function may be instantiated under a target pragma.

#ifndef SEXTANT_VEC_INLINE
#define SEXTANT_VEC_INLINE static inline __attribute__((always_inline))
#endif

constexpr int W = SEXTANT_VEC_W;
constexpr int VPB = 16 / W;  // vectors per 16 floats
typedef float vf __attribute__((vector_size(4 * SEXTANT_VEC_W)));
typedef float vfu __attribute__((vector_size(4 * SEXTANT_VEC_W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * SEXTANT_VEC_W)));
typedef uint32_t vu __attribute__((vector_size(4 * SEXTANT_VEC_W)));
typedef uint16_t vh __attribute__((vector_size(2 * SEXTANT_VEC_W), aligned(2), may_alias));

SEXTANT_VEC_INLINE vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
SEXTANT_VEC_INLINE vf load(const uint16_t* p) {  // bf16
  const vu wide = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16;
  return reinterpret_cast<vf>(wide);
}
SEXTANT_VEC_INLINE void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
SEXTANT_VEC_INLINE vf splat(float x) { return x - vf{}; }
SEXTANT_VEC_INLINE vf fma_lanes(vf a, vf b, vf c) {
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
SEXTANT_VEC_INLINE vi lanes(int32_t first) {
  vi x{};
  for (int i = 0; i < W; ++i) x[i] = first + i;
  return x;
}

// exp(x) for x <= 0 to within 1 ulp (Cephes' expf polynomial on |r| <= ln2 / 2, x = n ln2 + r). Below -87 (a result under
// 1.7e-38, nothing beside the row's maximum of 1) exactly zero. NaN stays NaN.
SEXTANT_VEC_INLINE vf exp_nonpositive(vf x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(y) in the low mantissa bits
  const vf t = SEXTANT_VEC_FMA(x, splat(1.44269504088896341f), splat(kMagic));
  const vf n = t - kMagic;
  vf r = SEXTANT_VEC_FMA(n, splat(-0.693359375f), x);
  r = SEXTANT_VEC_FMA(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = SEXTANT_VEC_FMA(p, r, splat(1.3981999507e-3f));
  p = SEXTANT_VEC_FMA(p, r, splat(8.3334519073e-3f));
  p = SEXTANT_VEC_FMA(p, r, splat(4.1665795894e-2f));
  p = SEXTANT_VEC_FMA(p, r, splat(1.6666665459e-1f));
  p = SEXTANT_VEC_FMA(p, r, splat(5.0000001201e-1f));
  const vf square = r * r;
  p = SEXTANT_VEC_FMA(p, square, r) + 1.0f;
  // low bits of t are 0x4B400000 + n; (n + 127) << 23 is 2^n
  const vi bits = (reinterpret_cast<vi>(t) - (0x4B400000 - 127)) << 23;
  p = p * reinterpret_cast<vf>(bits);
  return x < splat(-87.0f) ? vf{} : p;
}
