// Torch op over sampling.h: sextant::sample for CPU logits, rows in parallel.
#include "sampling.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace {

using sextant::sampling::RowParameters;

void check_spans(const at::Tensor& start, const at::Tensor& ids, int64_t rows, int64_t vocab, const char* what) {
  TORCH_CHECK_VALUE(start.scalar_type() == at::kLong && start.is_contiguous() && start.numel() == rows + 1 &&
                        ids.scalar_type() == at::kLong && ids.is_contiguous(),
                    what, " must be an int64 [rows + 1] start and contiguous int64 ids");
  const int64_t* s = start.data_ptr<int64_t>();
  TORCH_CHECK_VALUE(s[0] == 0 && s[rows] == ids.numel(), what, " start must run from 0 to the number of ids");
  for (int64_t r = 0; r < rows; ++r) TORCH_CHECK_VALUE(s[r] <= s[r + 1], what, " start must ascend");
  const int64_t* id = ids.data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < vocab, what, " id ", id[i], " is outside the vocabulary of ", vocab);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample(
    at::Tensor logits, const at::Tensor& real, const at::Tensor& integer, const at::Tensor& penalty_start,
    const at::Tensor& penalty_ids, const at::Tensor& penalty_counts, const at::Tensor& bias_start,
    const at::Tensor& bias_ids, const at::Tensor& bias_values) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.scalar_type() == at::kFloat && logits.size(1) > 0 &&
                        logits.size(1) <= std::numeric_limits<int32_t>::max() - 1024,
                    "logits must be float32 [rows, vocabulary]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  // Rows are changed and restored in place, so they must not share memory.
  if (logits.stride(1) != 1 || (rows > 1 && logits.stride(0) < vocab)) logits = logits.contiguous();
  TORCH_CHECK_VALUE(real.scalar_type() == at::kDouble && real.is_contiguous() && real.numel() == rows * 6,
                    "real parameters must be float64 [rows, 6]");
  TORCH_CHECK_VALUE(integer.scalar_type() == at::kLong && integer.is_contiguous() && integer.numel() == rows * 4,
                    "integer parameters must be int64 [rows, 4]");
  check_spans(penalty_start, penalty_ids, rows, vocab, "penalty");
  check_spans(bias_start, bias_ids, rows, vocab, "bias");
  TORCH_CHECK_VALUE(penalty_counts.scalar_type() == at::kLong && penalty_counts.is_contiguous() &&
                        penalty_counts.numel() == penalty_ids.numel() && bias_values.scalar_type() == at::kFloat &&
                        bias_values.is_contiguous() && bias_values.numel() == bias_ids.numel(),
                    "penalty_counts (int64) and bias_values (float32) must match their ids");
  const int64_t* integers = integer.data_ptr<int64_t>();
  int64_t alternatives = 0;
  for (int64_t r = 0; r < rows; ++r) alternatives = std::max(alternatives, std::min(integers[r * 4 + 3], vocab));

  const float nan = std::numeric_limits<float>::quiet_NaN();
  at::Tensor tokens = at::empty({rows}, at::kLong);
  at::Tensor logprobs = at::full({rows}, nan, at::kFloat);
  at::Tensor top_ids = at::full({rows, alternatives}, -1, at::kLong);
  at::Tensor top_logprobs = at::full({rows, alternatives}, nan, at::kFloat);
  float* x = logits.data_ptr<float>();
  const double* reals = real.data_ptr<double>();
  const int64_t* penalty = penalty_start.data_ptr<int64_t>();
  const int64_t* bias = bias_start.data_ptr<int64_t>();
  int64_t* token = tokens.data_ptr<int64_t>();
  float* logprob = logprobs.data_ptr<float>();
  int64_t* top_id = top_ids.data_ptr<int64_t>();
  float* top_logprob = top_logprobs.data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    static thread_local sextant::sampling::Workspace work;
    for (int64_t r = begin; r < end; ++r) {
      const double* d = reals + r * 6;
      const int64_t* i = integers + r * 4;
      const RowParameters p{d[0], d[1], d[2], d[3], d[4], d[5], i[0], i[1], i[2], i[3],
                            penalty_ids.data_ptr<int64_t>() + penalty[r],
                            penalty_counts.data_ptr<int64_t>() + penalty[r], penalty[r + 1] - penalty[r],
                            bias_ids.data_ptr<int64_t>() + bias[r], bias_values.data_ptr<float>() + bias[r],
                            bias[r + 1] - bias[r]};
      token[r] = sextant::sampling::sample_row(x + r * logits.stride(0), vocab, p, work, logprob + r,
                                               top_id + r * alternatives, top_logprob + r * alternatives);
    }
  });
  return {tokens, logprobs, top_ids, top_logprobs};
}

double uniform(int64_t seed, int64_t position) {
  return sextant::sampling::uniform(static_cast<uint64_t>(seed), static_cast<uint64_t>(position));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.def(
      "sample(Tensor(a!) logits, Tensor real, Tensor integer, Tensor penalty_start, Tensor penalty_ids, "
      "Tensor penalty_counts, Tensor bias_start, Tensor bias_ids, Tensor bias_values) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sampling_uniform(int seed, int position) -> float", &uniform);
  m.def("sampling_set_isa(int isa) -> int", &sextant::sampling::set_isa);
}

TORCH_LIBRARY_IMPL(sextant, CPU, m) { m.impl("sample", &sample); }
