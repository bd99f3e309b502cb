// Which instruction set the loops of paged attention and sampling run on, decided when the library is loaded.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define SEXTANT_VEC_X86 1
#include <immintrin.h>
#endif

namespace sextant::vec {
namespace {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa best_isa() {
#ifdef SEXTANT_VEC_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// The instruction set in use in this library; tests lower it to compare the paths, nothing else writes it.
inline std::atomic<int>& isa_in_use() {
  static std::atomic<int> isa{static_cast<int>(best_isa())};
  return isa;
}

inline int64_t set_isa(int64_t isa) {
  if (isa >= 0) isa_in_use() = static_cast<int>(isa < static_cast<int>(best_isa()) ? isa : static_cast<int>(best_isa()));
  return isa_in_use();
}

}  // namespace
}  // namespace sextant::vec
