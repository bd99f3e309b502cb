// y = x W^T (+ bias) (+ y) with a balanced W in the lanes layout, over plain pointers: kernels.balanced's own kernels, for the threads
// of a decoder step to share out. Each output is one chain over its entries: its bits depend on the row of x and the weight alone.
#pragma once

#include <cstdint>

#include "balanced/csrc/balanced.h"

namespace sextant {

// y[rows][w.rows] from rows of x that are padded with zeros to w.x_stride() floats.
struct BalancedWork {
  static constexpr int64_t kUnit = 4;  // groups of 16 weight rows that threads share out

  const BalancedLanes* w;
  const float* x;
  int64_t rows;
  float* y;
  const float* bias;
  bool accumulate;

  int64_t units() const { return (w->groups() + kUnit - 1) / kUnit; }

  // Units first ... last - 1, all rows.
  void run(int64_t first, int64_t last) const;

 private:
  void finish(const float* from, int64_t row, int64_t group, int64_t groups) const;
};

}  // namespace sextant
