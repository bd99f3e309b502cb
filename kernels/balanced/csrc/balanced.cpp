// Torch ops over the lanes layout: sextant::balanced_matmul for CPU tensors, and the instruction set that it runs on.
#include "balanced/csrc/balanced.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "balanced/csrc/balanced_choice.h"
#include "balanced/csrc/balanced_lanes.h"

namespace sextant {
namespace {

// y[m][rows] for the groups first ... last - 1.
void multiply(const BalancedLanes& w, const float* x, int64_t x_stride, int64_t m, int64_t first, int64_t last,
              const float* bias, float* y) {
  float out[kRows * 4 * kLanes];  // as much as one row with kGroups
  for (int64_t group = first; group < last;) {
    const int64_t left = last - group, groups = m == 1 && left >= kGroups ? kGroups : left >= 4 ? 4 : 1;
    for (int64_t row = 0; row < m;) {
      const int64_t rows = m - row >= kRows ? kRows : m - row >= 2 ? 2 : 1;  // m == 1: one, with up to kGroups
      run_product(w, x + row * x_stride, x_stride, rows, group, groups, out);
      const int64_t begin = group * kLanes, count = std::min(groups * kLanes, w.rows - begin);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = out + r * groups * kLanes;
        float* to = y + (row + r) * w.rows + begin;
        for (int64_t i = 0; i < count; ++i) {
          const float value = w.scales ? from[i] * w.scales[begin + i] : from[i];
          to[i] = bias ? value + bias[begin + i] : value;
        }
      }
      row += rows;
    }
    group += groups;
  }
}

at::Tensor balanced_matmul(const at::Tensor& x, const at::Tensor& values, const at::Tensor& index, const at::Tensor& scales,
                           const std::optional<at::Tensor>& bias, int64_t rows, int64_t columns, int64_t tile, int64_t kind) {
  const BalancedLanes w = lanes_of(values, index, scales, rows, columns, tile, kind);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == columns, "x must be [batch, ", columns, "], got ", x.sizes());
  const int64_t m = x.size(0), x_stride = w.x_stride();
  // A padded copy of x in float32: whatever its dtype, strides and alignment, and zeros beyond its last column.
  const at::Tensor plain = x.scalar_type() == at::kFloat && x.is_contiguous() ? x : x.to(at::kFloat).contiguous();
  at::Tensor wide = at::empty({m, x_stride}, plain.options());
  for (int64_t r = 0; r < m; ++r) {
    float* row = wide.mutable_data_ptr<float>() + r * x_stride;
    std::memcpy(row, plain.const_data_ptr<float>() + r * columns, columns * 4);
    std::memset(row + columns, 0, (x_stride - columns) * 4);
  }
  at::Tensor b;
  if (bias) {
    TORCH_CHECK_VALUE(bias->numel() == rows && bias->device().is_cpu(), "bias must have ", rows, " values on the CPU");
    b = bias->to(at::kFloat).contiguous();
  }
  at::Tensor y = at::empty({m, rows}, plain.options());
  const float* from = wide.const_data_ptr<float>();
  const float* add = bias ? b.const_data_ptr<float>() : nullptr;
  float* to = y.mutable_data_ptr<float>();
  const int64_t units = (w.groups() + kGroups - 1) / kGroups;
  // A thread that gets less than some ten microseconds of work costs more than it brings.
  const int64_t unit_work = std::max<int64_t>(1, w.entries() * kLanes * kGroups * (1 + m / 4));
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / unit_work);
  at::parallel_for(0, units, grain, [&](int64_t first, int64_t last) {
    multiply(w, from, x_stride, m, first * kGroups, std::min(last * kGroups, w.groups()), add, to);
  });
  return x.scalar_type() == at::kFloat ? y : y.to(x.scalar_type());
}

}  // namespace
}  // namespace sextant

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.def("balanced_matmul(Tensor x, Tensor values, Tensor index, Tensor scales, Tensor? bias, int rows, int columns, int tile, "
        "int kind) -> Tensor");
  m.def("balanced_set_isa(int isa) -> int", &sextant::vec::set_isa);  // for tests; negative asks
}

TORCH_LIBRARY_IMPL(sextant, CPU, m) { m.impl("balanced_matmul", &sextant::balanced_matmul); }
