// BalancedWork: walks through rows of x and groups of the weight.
#include "decoder/csrc/balanced_product.h"

#include <algorithm>

#include "balanced/csrc/balanced_choice.h"

namespace sextant {

// A block of rows stays in the second-level cache while the weight passes by it.
void BalancedWork::run(int64_t first, int64_t last) const {
  const int64_t stride = w->x_stride(), end_group = std::min(last * kUnit, w->groups());
  const int64_t block = std::max<int64_t>(4, (int64_t{320} << 10) / (stride * 4) / 4 * 4);
  float out[kRows * kUnit * kLanes];  // as much as one row with kGroups
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t end = std::min(begin + block, rows);
    for (int64_t group = first * kUnit; group < end_group;) {
      const int64_t left = end_group - group, groups = rows == 1 && left >= kGroups ? kGroups : left >= kUnit ? kUnit : 1;
      for (int64_t row = begin; row < end;) {
        const int64_t count = end - row >= kRows ? kRows : end - row >= 2 ? 2 : 1;
        run_product(*w, x + row * stride, stride, count, group, groups, out);
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
