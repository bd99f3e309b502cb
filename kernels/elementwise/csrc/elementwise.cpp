// Torch ops over elementwise.h: sextant::rms_norm, sextant::silu_mul, sextant::rope for CPU tensors, parallel over rows.
#include "elementwise/csrc/elementwise.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.dim() >= 1, "x must be float32 with a last dimension");
  const int64_t n = x.size(-1);
  TORCH_CHECK_VALUE(weight.numel() == n, "weight must have one value for each of the ", n, " columns");
  const at::Tensor rows = x.contiguous(), w = weight.to(at::kFloat).contiguous();
  at::Tensor out = at::empty_like(rows);
  const float *from = rows.data_ptr<float>(), *by = w.data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, n == 0 ? 0 : rows.numel() / n, 16, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) sextant::rms_norm_row(from + r * n, by, n, static_cast<float>(eps), to + r * n);
  });
  return out;
}

at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes() && gate.scalar_type() == at::kFloat && up.scalar_type() == at::kFloat,
                    "gate and up must be float32 of one shape");
  const at::Tensor g = gate.contiguous(), u = up.contiguous();
  at::Tensor out = at::empty_like(g);
  const int64_t n = g.dim() ? g.size(-1) : 1;
  const float *a = g.data_ptr<float>(), *b = u.data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, n == 0 ? 0 : g.numel() / n, 16, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) sextant::silu_mul_row(a + r * n, b + r * n, n, to + r * n);
  });
  return out;
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& table, bool interleaved) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.scalar_type() == at::kFloat && x.size(2) % 2 == 0, "x must be float32 [tokens, heads, even dim]");
  const int64_t heads = x.size(1), dim = x.size(2);
  TORCH_CHECK_VALUE(table.dim() == 3 && table.size(1) == 2 && table.size(2) == dim / 2 && table.is_contiguous() &&
                        table.scalar_type() == at::kFloat, "the table must be float32 [positions, 2, dim / 2]");
  TORCH_CHECK_VALUE(positions.numel() == x.size(0), "there must be one position for each token");
  const at::Tensor where = positions.to(at::kInt).contiguous();
  const int32_t* p = where.data_ptr<int32_t>();
  for (int64_t t = 0; t < x.size(0); ++t)
    TORCH_CHECK_INDEX(p[t] >= 0 && p[t] < table.size(0), "position ", p[t], " is outside the table");
  at::Tensor out = x.contiguous().clone();
  float* to = out.data_ptr<float>();
  const float* angles = table.data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < heads; ++h)
        sextant::rope_head(to + (t * heads + h) * dim, angles + p[t] * dim, angles + p[t] * dim + dim / 2, dim, interleaved);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("rope(Tensor x, Tensor positions, Tensor table, bool interleaved) -> Tensor");
}

TORCH_LIBRARY_IMPL(sextant, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("silu_mul", &silu_mul);
  m.impl("rope", &rope);
}
