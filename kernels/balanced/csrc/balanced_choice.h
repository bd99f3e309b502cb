// Which kernel of this CPU multiplies a balanced weight: one step of rows of x with groups of the weight. Where the AVX2 and AVX-512
// kernels are compiled. For one source file of an extension that includes none of another's `portable` kernels.
#pragma once

#include "balanced/csrc/balanced.h"
#include "balanced/csrc/balanced_portable.h"
#include "simd/csrc/cpu_isa.h"

namespace sextant {
namespace {

#ifdef SEXTANT_VEC_X86
#define SEXTANT_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "balanced/csrc/balanced_avx2.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c")
#endif
#include "balanced/csrc/balanced_avx512.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // SEXTANT_VEC_X86

constexpr int kRows = 4;    // rows of x that a kernel takes at once at most
constexpr int kGroups = 8;  // groups of weight rows that one row of x takes at once at most: streams of memory

using Product = void (*)(const BalancedLanes&, const float*, int64_t, int64_t, float*);

#ifdef SEXTANT_VEC_X86
#define SEXTANT_CHOOSE(isa)                                                                                    \
  template <typename Value, BalancedIndex KIND, int REGISTERS>                                                 \
  Product choose_##isa(int64_t rows, int64_t groups) {                                                         \
    if (groups == 1)                                                                                           \
      return rows == 1   ? isa::product<Value, KIND, REGISTERS, 1, 1>                                          \
             : rows == 2 ? isa::product<Value, KIND, REGISTERS, 2, 1>                                          \
                         : isa::product<Value, KIND, REGISTERS, 4, 1>;                                         \
    if (groups == kGroups) return isa::product<Value, KIND, REGISTERS, 1, kGroups>;                            \
    return rows == 1   ? isa::product<Value, KIND, REGISTERS, 1, 4>                                            \
           : rows == 2 ? isa::product<Value, KIND, REGISTERS, 2, 4>                                            \
                       : isa::product<Value, KIND, REGISTERS, 4, 4>;                                           \
  }                                                                                                            \
  template <typename Value>                                                                                    \
  Product choose_##isa(const BalancedLanes& w, int64_t rows, int64_t groups) {                                 \
    if (w.kind == BalancedIndex::kBitmap) return choose_##isa<Value, BalancedIndex::kBitmap, 2>(rows, groups); \
    if (w.kind == BalancedIndex::kNibble) return choose_##isa<Value, BalancedIndex::kNibble, 1>(rows, groups); \
    if (w.tile <= 32) return choose_##isa<Value, BalancedIndex::kByte, 2>(rows, groups);                       \
    if (w.tile <= 64) return choose_##isa<Value, BalancedIndex::kByte, 4>(rows, groups);                       \
    if (w.tile <= 128) return choose_##isa<Value, BalancedIndex::kByte, 8>(rows, groups);                      \
    return choose_##isa<Value, BalancedIndex::kByte, 16>(rows, groups);                                        \
  }                                                                                                            \
  Product choose_##isa(const BalancedLanes& w, int64_t rows, int64_t groups) {                                 \
    switch (w.value) {                                                                                         \
      case BalancedValue::kF32:                                                                                \
        return choose_##isa<isa::F32>(w, rows, groups);                                                        \
      case BalancedValue::kBf16:                                                                               \
        return choose_##isa<isa::Bf16>(w, rows, groups);                                                       \
      case BalancedValue::kF16:                                                                                \
        return choose_##isa<isa::F16>(w, rows, groups);                                                        \
      default:                                                                                                 \
        return choose_##isa<isa::Int8>(w, rows, groups);                                                       \
    }                                                                                                          \
  }
SEXTANT_CHOOSE(avx2)
SEXTANT_CHOOSE(avx512)
#undef SEXTANT_CHOOSE
#endif

// One step: `rows` (1, 2 or 4) of x with `groups` (1, 4, or 8 for one row) of the weight from `group` on; out[row][group][16].
void run_product(const BalancedLanes& w, const float* x, int64_t x_stride, int64_t rows, int64_t group, int64_t groups,
                 float* out) {
#ifdef SEXTANT_VEC_X86
  const auto isa = static_cast<vec::Isa>(vec::isa_in_use().load(std::memory_order_relaxed));
  if (isa != vec::Isa::kPortable) {
    const Product product = isa == vec::Isa::kAvx512 ? choose_avx512(w, rows, groups) : choose_avx2(w, rows, groups);
    product(w, x, x_stride, group, out);
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) portable::product(w, x + r * x_stride, group + g, out + (r * groups + g) * kLanes);
}

}  // namespace
}  // namespace sextant
