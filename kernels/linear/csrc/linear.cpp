// Torch ops over linear.h: sextant::packed_linear for CPU tensors, and the memory that packed weights lie in.
#include "linear/csrc/linear.h"
#include "linear/csrc/weight_memory.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace {

at::Tensor packed_linear(const at::Tensor& x, int64_t kind, int64_t n, const at::Tensor& data, const at::Tensor& scales,
                         const at::Tensor& offsets, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kFloat, "x must be float32 [rows, inputs]");
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 2, "unknown kind of weights");
  const at::Tensor rows = x.contiguous();
  sextant::PackedLinear w;
  w.kind = static_cast<sextant::LinearKind>(kind);
  w.n = n;
  w.k = x.size(1);
  TORCH_CHECK_VALUE(data.is_contiguous() && static_cast<int64_t>(data.nbytes()) == w.panels() * w.panel_bytes(),
                    "the packed weight has ", data.nbytes(), " bytes; ", n, " x ", w.k, " needs ", w.panels() * w.panel_bytes());
  w.data = static_cast<const char*>(data.data_ptr());
  if (w.kind == sextant::LinearKind::kInt8) {
    TORCH_CHECK_VALUE(scales.numel() == w.panels() * sextant::kPanel && offsets.numel() == scales.numel(),
                      "int8 weights need a scale and an offset for each padded column");
    w.scales = scales.data_ptr<float>();
    w.offsets = offsets.data_ptr<int32_t>();
  }
  at::Tensor b;
  if (bias) {
    b = bias->to(at::kFloat).contiguous();
    TORCH_CHECK_VALUE(b.numel() == n, "the bias must have one value for each output");
  }
  const int64_t m = rows.size(0);
  at::Tensor y = at::empty({m, n}, rows.options());
  int64_t stride = sextant::prepared_stride(w);
  const void* prepared = rows.data_ptr<float>();
  std::vector<float> row_scales(m, 1.0f);
  at::Tensor buffer;
  if (stride > 0) {
    buffer = at::empty({m, stride}, rows.options().dtype(at::kByte));
    auto* base = static_cast<char*>(buffer.data_ptr());
    const float* from = rows.data_ptr<float>();
    at::parallel_for(0, m, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) row_scales[r] = sextant::prepare_row(w, from + r * w.k, base + r * stride);
    });
    prepared = base;
  } else {
    stride = w.k * 4;
  }
  const sextant::LinearWork work{&w,
                                 prepared,
                                 stride,
                                 row_scales.data(),
                                 m,
                                 y.data_ptr<float>(),
                                 n,
                                 bias ? b.data_ptr<float>() : nullptr,
                                 false};
  at::parallel_for(0, w.panels(), 1, [&](int64_t first, int64_t last) { work.run(first, last); });
  return y;
}

std::string numerics(int64_t kind) { return sextant::linear_numerics(static_cast<sextant::LinearKind>(kind)); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.def("packed_linear(Tensor x, int kind, int n, Tensor data, Tensor scales, Tensor offsets, Tensor? bias) -> Tensor");
  m.def("linear_numerics(int kind) -> str", &numerics);
  m.def("linear_set_level(int level) -> int", &sextant::linear_detail::set_level);  // for tests; negative asks
  m.def("weight_memory(int bytes) -> Tensor", &sextant::weight_memory);
}

TORCH_LIBRARY_IMPL(sextant, CPU, m) { m.impl("packed_linear", &packed_linear); }
