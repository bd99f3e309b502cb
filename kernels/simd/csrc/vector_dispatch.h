// Compiles the file that SEXTANT_VEC_LOOPS names once per instruction set, into namespaces portable, avx2 and avx512 of the
// namespace around the include. No include guard: each user sets SEXTANT_VEC_LOOPS and includes it. cpu_isa.h comes first.

namespace portable {
#define SEXTANT_VEC_W 4
#ifdef __FP_FAST_FMAF  // an FMA in the base instruction set (aarch64): the bits of the x86 paths
#define SEXTANT_VEC_FMA(a, b, c) fma_lanes(a, b, c)
#else
#define SEXTANT_VEC_FMA(a, b, c) ((a) * (b) + (c))
#endif
#define SEXTANT_VEC_REGS 12
#include SEXTANT_VEC_LOOPS
#undef SEXTANT_VEC_W
#undef SEXTANT_VEC_FMA
#undef SEXTANT_VEC_REGS
}  // namespace portable

#ifdef SEXTANT_VEC_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define SEXTANT_VEC_W 8
#define SEXTANT_VEC_FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SEXTANT_VEC_REGS 12
#include SEXTANT_VEC_LOOPS
#undef SEXTANT_VEC_W
#undef SEXTANT_VEC_FMA
#undef SEXTANT_VEC_REGS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
namespace avx512 {
#define SEXTANT_VEC_W 16
#define SEXTANT_VEC_FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SEXTANT_VEC_REGS 24
#include SEXTANT_VEC_LOOPS
#undef SEXTANT_VEC_W
#undef SEXTANT_VEC_FMA
#undef SEXTANT_VEC_REGS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // SEXTANT_VEC_X86
