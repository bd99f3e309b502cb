// One matrix of the decoder stack: dense panels (kernels.linear) or a balanced weight (kernels.balanced), behind one set of calls.
#pragma once

#include <cstdint>
#include <cstring>

#include "decoder/csrc/balanced_product.h"
#include "decoder/csrc/team.h"
#include "linear/csrc/linear.h"

namespace sextant {

struct DecoderMatrix {
  bool is_balanced = false;
  PackedLinear dense;
  BalancedLanes balanced;

  int64_t inputs() const { return is_balanced ? balanced.columns : dense.k; }

  // Bytes between prepared rows; 0: the fp32 rows are used as they are.
  int64_t stride() const { return is_balanced ? balanced.x_stride() * 4 : prepared_stride(dense); }

  // One row of activations as the product wants it; returns its scale (1 but for int8 panels).
  float prepare(const float* x, void* out) const {
    if (!is_balanced) return prepare_row(dense, x, out);
    const int64_t bytes = balanced.columns * 4;
    std::memcpy(out, x, static_cast<size_t>(bytes));
    std::memset(static_cast<char*>(out) + bytes, 0, static_cast<size_t>(stride() - bytes));
    return 1.0f;
  }

  // y = x W^T (+ bias) (+ y) from prepared rows, all threads together.
  void multiply(Team::Member& member, const void* x, const float* row_scales, int64_t rows, float* y, const float* bias,
                bool accumulate) const {
    if (is_balanced) {
      const BalancedWork work{&balanced, static_cast<const float*>(x), rows, y, bias, accumulate};
      member.spread(rows > 0 ? work.units() : 0, [&](int64_t first, int64_t last) { work.run(first, last); });
      return;
    }
    const LinearWork work{&dense, x, stride() > 0 ? stride() : dense.k * 4, row_scales, rows, y, dense.n, bias, accumulate};
    member.spread(rows > 0 ? dense.panels() : 0, [&](int64_t first, int64_t last) { work.run(first, last); });
  }
};

}  // namespace sextant
