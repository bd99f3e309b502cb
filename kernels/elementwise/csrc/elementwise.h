// The small operations of a decoder layer over plain pointers, one row at a time: used by elementwise.cpp and by the decoder.
#pragma once

#include <cstdint>

#include "simd/csrc/cpu_isa.h"

namespace sextant {
namespace elementwise_detail {
namespace {

#define SEXTANT_VEC_LOOPS "elementwise/csrc/elementwise_isa.h"
#include "simd/csrc/vector_dispatch.h"
#undef SEXTANT_VEC_LOOPS

}  // namespace
}  // namespace elementwise_detail

#ifdef SEXTANT_VEC_X86
#define SEXTANT_ELEMENTWISE_CALL(function, ...)                                                     \
  switch (static_cast<vec::Isa>(vec::isa_in_use().load(std::memory_order_relaxed))) {               \
    case vec::Isa::kAvx512: return elementwise_detail::avx512::function(__VA_ARGS__);               \
    case vec::Isa::kAvx2: return elementwise_detail::avx2::function(__VA_ARGS__);                   \
    default: return elementwise_detail::portable::function(__VA_ARGS__);                            \
  }
#else
#define SEXTANT_ELEMENTWISE_CALL(function, ...) return elementwise_detail::portable::function(__VA_ARGS__)
#endif

inline void rms_norm_row(const float* x, const float* weight, int64_t n, float eps, float* out) {
  SEXTANT_ELEMENTWISE_CALL(rms_norm_row, x, weight, n, eps, out);
}
inline void silu_mul_row(const float* gate, const float* up, int64_t n, float* out) {
  SEXTANT_ELEMENTWISE_CALL(silu_mul_row, gate, up, n, out);
}
inline void rope_head(float* x, const float* cosine, const float* sine, int64_t dim, bool interleaved) {
  SEXTANT_ELEMENTWISE_CALL(rope_head, x, cosine, sine, dim, interleaved);
}

}  // namespace sextant
