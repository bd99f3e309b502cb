// Choosing one token from one row of logits on the CPU: a pure function of the row and its parameters, so that neither the
// batch nor the number of threads can change it. sampling.cpp wraps it as a torch op.
//
// No full sort and no copy of the row: the maxima of groups of 64 tokens, made in one pass, tell which groups can hold a
// candidate. The k-th largest group maximum is a lower bound of the k-th largest logit, so a top-k looks at about k groups;
// a nucleus (top-p) starts from the tokens near the maximum and widens only if their weight falls short.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace sextant::sampling {

struct RowParameters {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int64_t top_k, seed, position, num_logprobs;
  const int64_t* penalty_ids;
  const int64_t* penalty_counts;
  int64_t penalty_size;
  const int64_t* bias_ids;
  const float* bias_values;
  int64_t bias_size;
};

// `key` ascends in the order (logit descending, id ascending): the inverted sortable bits of the logit, then the id.
struct Candidate {
  uint64_t key;
  float weight;
  int32_t id() const { return static_cast<int32_t>(key & 0xFFFFFFFFu); }
  float logit() const {
    const uint32_t sortable = ~static_cast<uint32_t>(key >> 32);
    return std::bit_cast<float>(sortable >> 31 ? sortable & 0x7FFFFFFFu : ~sortable);
  }
  static Candidate of(float logit, int32_t id, float weight) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 equals +0
    const uint32_t sortable = bits >> 31 ? ~bits : bits | 0x80000000u;
    return {static_cast<uint64_t>(~sortable) << 32 | static_cast<uint32_t>(id), weight};
  }
};

// Memory of one thread, reused from row to row.
struct Workspace {
  std::vector<float> groups, selection, values, weights;
  std::vector<double> sums;
  std::vector<int32_t> ids;
  std::vector<Candidate> candidates;
  std::vector<float> undo;
};

// Number in [0, 1) of (seed, position): Philox4x32-10, as kernels/sampling/philox.py.
double uniform(uint64_t seed, uint64_t position);

// Chooses a token (-1: the row holds NaN or +inf, or nothing may be chosen) and writes its log-probability (if
// num_logprobs >= 0) and the likeliest num_logprobs tokens. `logits` is changed and restored on the way.
int64_t sample_row(float* logits, int64_t vocab, const RowParameters& parameters, Workspace& work, float* logprob,
                   int64_t* top_ids, float* top_logprobs);

// For tests: 0 portable, 1 AVX2, 2 AVX-512, negative only asks; returns the one in use, never above what the CPU has.
int64_t set_isa(int64_t isa);

}  // namespace sextant::sampling
