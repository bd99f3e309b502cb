// BalancedWork: chooses the kernel of this CPU and walks through rows of x and groups of the weight.
#include "decoder/csrc/balanced_product.h"

#include <algorithm>

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

// One step: `rows` (1, 2 or 4) of x with `groups` (1 or 4, for one row also 8) of the weight; out[row][group][16].
using Product = void (*)(const BalancedLanes&, const float*, int64_t, int64_t, float*);

#define SEXTANT_CHOOSE(isa)                                                                                    \
  template <typename Value, BalancedIndex KIND, int REGISTERS>                                                 \
  Product choose_##isa(int64_t rows, int64_t groups) {                                                         \
    if (groups == 8) return isa::product<Value, KIND, REGISTERS, 1, 8>;                                        \
    if (groups == 4)                                                                                           \
      return rows == 1   ? isa::product<Value, KIND, REGISTERS, 1, 4>                                          \
             : rows == 2 ? isa::product<Value, KIND, REGISTERS, 2, 4>                                          \
                         : isa::product<Value, KIND, REGISTERS, 4, 4>;                                         \
    return rows == 1   ? isa::product<Value, KIND, REGISTERS, 1, 1>                                            \
           : rows == 2 ? isa::product<Value, KIND, REGISTERS, 2, 1>                                            \
                       : isa::product<Value, KIND, REGISTERS, 4, 1>;                                           \
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
#endif  // SEXTANT_VEC_X86

void product(const BalancedLanes& w, const float* x, int64_t x_stride, int64_t rows, int64_t group, int64_t groups,
                    float* out) {
#ifdef SEXTANT_VEC_X86
  const auto isa = static_cast<vec::Isa>(vec::isa_in_use().load(std::memory_order_relaxed));
  if (isa != vec::Isa::kPortable) {
    const Product chosen = isa == vec::Isa::kAvx512 ? choose_avx512(w, rows, groups) : choose_avx2(w, rows, groups);
    chosen(w, x, x_stride, group, out);
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) portable::product(w, x + r * x_stride, group + g, out + (r * groups + g) * kLanes);
}

}  // namespace

// A block of rows stays in the second-level cache while the weight passes by it.
void BalancedWork::run(int64_t first, int64_t last) const {
  const int64_t stride = w->x_stride(), end_group = std::min(last * kUnit, w->groups());
  const int64_t block = std::max<int64_t>(4, (int64_t{320} << 10) / (stride * 4) / 4 * 4);
  float out[4 * kUnit * kLanes];  // as much as one row with eight groups
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t end = std::min(begin + block, rows);
    for (int64_t group = first * kUnit; group < end_group;) {
      const int64_t left = end_group - group, groups = rows == 1 && left >= 8 ? 8 : left >= kUnit ? kUnit : 1;
      for (int64_t row = begin; row < end;) {
        const int64_t count = end - row >= 4 ? 4 : end - row >= 2 ? 2 : 1;
        product(*w, x + row * stride, stride, count, group, groups, out);
        for (int64_t r = 0; r < count; ++r) finish(out + r * groups * kLanes, row + r, group, groups);
        row += count;
      }
      group += groups;
    }
  }
}

void BalancedWork::finish(const float* from, int64_t row, int64_t group, int64_t groups) const {
  const int64_t begin = group * kLanes, count = std::min(groups * kLanes, w->rows - begin);
  float* to = y + row * w->rows + begin;
  for (int64_t i = 0; i < count; ++i) {
    float value = w->scales ? from[i] * w->scales[begin + i] : from[i];
    if (bias) value += bias[begin + i];
    to[i] = accumulate ? to[i] + value : value;
  }
}

}  // namespace sextant
