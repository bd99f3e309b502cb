// The product with a balanced weight without vector instructions: one row of x, one group of 16 weight rows, any index.
// Also how a single entry is read, which unpacking shares.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "balanced/csrc/balanced.h"

namespace sextant::portable {

inline float value_at(const BalancedLanes& w, const char* values, int64_t at) {
  switch (w.value) {
    case BalancedValue::kF32:
      return reinterpret_cast<const float*>(values)[at];
    case BalancedValue::kBf16:
      return static_cast<float>(reinterpret_cast<const c10::BFloat16*>(values)[at]);
    case BalancedValue::kF16:
      return static_cast<float>(reinterpret_cast<const c10::Half*>(values)[at]);
    default:
      return static_cast<float>(reinterpret_cast<const int8_t*>(values)[at]);
  }
}

// visit(entry, column) for every entry of one lane of one group, in order; entry counts within the group.
template <typename Visit>
void for_each_entry(const BalancedLanes& w, int64_t group, int64_t lane, const Visit& visit) {
  const char* index = w.index + group * w.index_stride();
  for (int64_t t = 0, entry = 0; t < w.tiles; ++t) {
    uint32_t left = w.kind == BalancedIndex::kBitmap ? reinterpret_cast<const uint32_t*>(index)[t * kLanes + lane] : 0;
    for (int64_t j = 0; j < w.per_tile; ++j, ++entry) {
      int64_t where = 0;
      if (w.kind == BalancedIndex::kBitmap) {
        where = left ? __builtin_ctz(left) : 0;
        left &= left - 1;
      } else if (w.kind == BalancedIndex::kNibble) {
        where = static_cast<uint8_t>(index[entry / 2 * kLanes + lane]) >> (entry % 2 * 4) & 15;
      } else {
        where = static_cast<uint8_t>(index[entry * kLanes + lane]);
      }
      visit(entry, t * w.tile + where);
    }
  }
}

inline void product(const BalancedLanes& w, const float* x, int64_t group, float* out) {
  const char* values = w.values + group * w.values_stride();
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    float sum = 0;
    for_each_entry(w, group, lane, [&](int64_t entry, int64_t column) {
      sum = __builtin_fmaf(value_at(w, values, entry * kLanes + lane), x[column], sum);
    });
    out[lane] = sum;
  }
}

}  // namespace sextant::portable
