// The algorithm behind sampling.h. Order of operations as in vLLM's sampler: bias and bans, repetition, frequency and
// presence penalties, temperature, min-p, top-k, top-p, draw.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd/csrc/cpu_isa.h"

namespace sextant::sampling {
namespace {

// Which tokens a draw may choose and how much each weighs: w = exp(z), z = (x - max) / T, where z >= z_min and (x, id) is
// not behind (x_min, last_id) in the order (logit descending, id ascending).
struct Weigher {
  float max, inverse_temperature, z_min, x_min;
  int32_t last_id;
};

// How far below the maximum, in natural logarithms, a nucleus is looked for; the last holds every token of weight > 0.
constexpr int kReaches = 9;
constexpr float kReach[kReaches] = {1.0f, 2.0f, 3.5f, 5.0f, 7.0f, 9.5f, 13.0f, 20.0f, 90.0f};

#define SEXTANT_VEC_LOOPS "sampling/csrc/sampling_isa.h"
#include "simd/csrc/vector_dispatch.h"
#undef SEXTANT_VEC_LOOPS

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kUnderflow = -87.0f;         // exp of less is zero (vector_isa.h)
constexpr double kGreedyTemperature = 1e-5;  // below it 1 / T could overflow; vLLM draws the same line
constexpr int64_t kFewCandidates = 512;      // below it sorting them by id beats another pass over the row

bool before(const Candidate& a, const Candidate& b) { return a.key < b.key; }

#ifdef SEXTANT_VEC_X86
#define SEXTANT_CALL(expression)                                                          \
  switch (static_cast<vec::Isa>(vec::isa_in_use().load(std::memory_order_relaxed))) {     \
    case vec::Isa::kAvx512: { using namespace avx512; return expression; }                \
    case vec::Isa::kAvx2: { using namespace avx2; return expression; }                    \
    default: { using namespace portable; return expression; }                             \
  }
#else
#define SEXTANT_CALL(expression) { using namespace portable; return expression; }
#endif

bool find_group_maxima(const float* x, int64_t n, std::vector<float>& groups) {
  groups.resize((n + 1023) / 1024 * 16);
  SEXTANT_CALL(group_maxima(x, n, groups.data()))
}

double sum_weights(const float* x, int64_t n, const Weigher& w, std::vector<double>& sums) {
  sums.resize((n + 1023) / 1024);
  SEXTANT_CALL(superblock_sums(x, n, w, sums.data()))
}

void sum_reaches(const float* x, int64_t n, const Weigher& w, double* sums) {
  SEXTANT_CALL(reach_sums(x, n, w, kReach, sums))
}

void weigh(const float* x, int64_t count, int64_t first, const Weigher& w, float* out) {
  SEXTANT_CALL(weights(x, count, first, w, out))
}

// Every token of at least `x_min`, with its weight, into work.candidates; looks only into groups that hold one.
void collect(const float* x, int64_t n, float x_min, const Weigher& w, Workspace& work) {
  if (static_cast<int64_t>(work.values.size()) < n + 1) {
    work.values.resize(n + 1);
    work.ids.resize(n + 1);
    work.weights.resize(n + 1);
  }
  int64_t count = 0;
  // Without a branch: a candidate or not is a coin toss for the branch predictor.
  const auto take = [&](int64_t i) {
    work.values[count] = x[i];
    work.ids[count] = static_cast<int32_t>(i);
    count += x[i] >= x_min;
  };
  for (int64_t first = 0; first < n; first += 1024) {
    const int64_t end = std::min(n, first + 1024);
    const float* group = work.groups.data() + first / 64;
    int hits = 0;
    for (int g = 0; g < 16; ++g) hits += group[g] >= x_min;
    if (hits > 4) {
      for (int64_t i = first; i < end; ++i) take(i);
    } else {
      for (int g = 0; g < 16 && hits > 0; ++g)
        if (group[g] >= x_min)
          for (int64_t i = first + g; i < end; i += 16) take(i);
    }
  }
  weigh(work.values.data(), count, 0, w, work.weights.data());
  work.candidates.resize(count);
  for (int64_t i = 0; i < count; ++i) work.candidates[i] = Candidate::of(work.values[i], work.ids[i], work.weights[i]);
}

// The k first tokens in the order (logit descending, id ascending) into work.candidates, the k-th last, others unordered.
void select_top(const float* x, int64_t n, int64_t k, const Weigher& w, Workspace& work) {
  float bound = -kInfinity;
  if (k <= static_cast<int64_t>(work.groups.size())) {
    work.selection = work.groups;
    std::nth_element(work.selection.begin(), work.selection.begin() + (k - 1), work.selection.end(), std::greater<>());
    bound = work.selection[k - 1];
  }
  collect(x, n, bound, w, work);
  std::nth_element(work.candidates.begin(), work.candidates.begin() + (k - 1), work.candidates.end(), before);
  work.candidates.resize(k);
}

// Cuts work.candidates to the shortest prefix (in order) whose weight reaches `wanted`.
void cut_nucleus(double wanted, Workspace& work) {
  auto& c = work.candidates;
  size_t lo = 0, hi = c.size();
  double weight = 0;
  while (hi - lo > 64) {
    const size_t middle = lo + (hi - lo) / 2;
    std::nth_element(c.begin() + lo, c.begin() + middle, c.begin() + hi, before);
    double left = 0;
    for (size_t i = lo; i < middle; ++i) left += c[i].weight;
    if (weight + left >= wanted) {
      hi = middle;
    } else {
      weight += left;
      lo = middle;
    }
  }
  std::sort(c.begin() + lo, c.begin() + hi, before);
  size_t kept = hi;
  for (size_t i = lo; i < hi; ++i) {
    weight += c[i].weight;
    if (weight >= wanted) {
      kept = i + 1;
      break;
    }
  }
  c.resize(kept);
}

// The first candidate, by id, whose cumulative weight exceeds the fraction u of the total.
int64_t draw_candidate(double u, std::vector<Candidate>& candidates) {
  std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.id() < b.id(); });
  double total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  const double target = u * total;
  double cumulative = 0;
  int64_t last = -1;
  for (const Candidate& c : candidates) {
    if (c.weight == 0) continue;
    last = c.id();
    cumulative += c.weight;
    if (cumulative > target) break;
  }
  return last;
}

// The same over the whole row: first the superblock, then the token in it.
int64_t draw_token(double u, const float* x, int64_t n, const Weigher& w, Workspace& work) {
  const double target = u * sum_weights(x, n, w, work.sums);
  double cumulative = 0;
  int64_t block = -1;
  for (int64_t b = 0; b < static_cast<int64_t>(work.sums.size()); ++b) {
    if (work.sums[b] == 0) continue;
    if (block >= 0) cumulative += work.sums[block];
    block = b;
    if (cumulative + work.sums[b] > target) break;
  }
  if (block < 0) return -1;
  const int64_t first = block * 1024, size = std::min<int64_t>(1024, n - first);
  if (work.weights.size() < 1024) work.weights.resize(1024);
  weigh(x + first, size, first, w, work.weights.data());
  int64_t last = -1;
  for (int64_t i = 0; i < size; ++i) {
    if (work.weights[i] == 0) continue;
    last = first + i;
    cumulative += work.weights[i];
    if (cumulative > target) break;
  }
  return last;
}

int64_t first_of(const float* x, int64_t n, float value, const std::vector<float>& groups) {
  int64_t found = n;
  for (int64_t g = 0; g < static_cast<int64_t>(groups.size()); ++g) {
    if (groups[g] != value) continue;
    const int64_t end = std::min(std::min(n, (g / 16 + 1) * 1024), found);
    for (int64_t i = g / 16 * 1024 + g % 16; i < end; i += 16)
      if (x[i] == value) {
        found = i;
        break;
      }
  }
  return found;
}

float highest(const std::vector<float>& groups) {
  float top = -kInfinity;
  for (const float g : groups) top = g > top ? g : top;
  return top;
}

// Bias, bans and penalties, into the row itself; work.undo remembers what was there.
void adjust(float* x, const RowParameters& p, Workspace& work) {
  work.undo.clear();
  for (int64_t i = 0; i < p.bias_size; ++i) {
    work.undo.push_back(x[p.bias_ids[i]]);
    x[p.bias_ids[i]] += p.bias_values[i];
  }
  for (int64_t i = 0; i < p.penalty_size; ++i) {
    float& logit = x[p.penalty_ids[i]];
    work.undo.push_back(logit);
    double value = logit;
    value = value > 0 ? value / p.repetition_penalty : value * p.repetition_penalty;
    if (p.penalty_counts[i] > 0)
      value -= p.frequency_penalty * static_cast<double>(p.penalty_counts[i]) + p.presence_penalty;
    logit = static_cast<float>(value);
  }
}

void restore(float* x, const RowParameters& p, Workspace& work) {
  for (int64_t i = p.penalty_size; i-- > 0;) x[p.penalty_ids[i]] = work.undo[p.bias_size + i];
  for (int64_t i = p.bias_size; i-- > 0;) x[p.bias_ids[i]] = work.undo[i];
}

int64_t choose(const float* x, int64_t n, const RowParameters& p, Workspace& work) {
  const float max = highest(work.groups);
  if (max == -kInfinity) return -1;
  if (p.temperature < kGreedyTemperature || p.top_k == 1) return first_of(x, n, max, work.groups);
  const double u = uniform(static_cast<uint64_t>(p.seed), static_cast<uint64_t>(p.position));
  Weigher w{max, static_cast<float>(1.0 / p.temperature), kUnderflow, -kInfinity, static_cast<int32_t>(n)};
  if (p.min_p > 0) w.z_min = std::max(kUnderflow, static_cast<float>(std::log(p.min_p)));
  const bool limited = p.top_k > 0 && p.top_k < n;
  if (!limited && p.top_p >= 1) return draw_token(u, x, n, w, work);
  if (limited) {
    select_top(x, n, p.top_k, w, work);
    if (p.top_p < 1) {
      double total = 0;
      for (const Candidate& c : work.candidates) total += c.weight;
      cut_nucleus(p.top_p * total, work);
    }
  } else {
    double sums[kReaches];
    sum_reaches(x, n, w, sums);
    const double wanted = p.top_p * sums[kReaches - 1];
    int l = 0;
    // a hair more than wanted: the candidates' own sum is rounded otherwise
    while (l < kReaches - 1 && sums[l] < wanted * (1 + 1e-5)) ++l;
    // slightly more for the rounding of z: a candidate too many does no harm
    const double lowest = static_cast<double>(max) - (kReach[l] * 1.001 + 1e-3) * p.temperature;
    collect(x, n, l == kReaches - 1 ? -kInfinity : static_cast<float>(lowest), w, work);
    cut_nucleus(wanted, work);
  }
  if (static_cast<int64_t>(work.candidates.size()) <= kFewCandidates) return draw_candidate(u, work.candidates);
  const Candidate& last = *std::max_element(work.candidates.begin(), work.candidates.end(), before);
  w.x_min = last.logit();
  w.last_id = last.id();
  return draw_token(u, x, n, w, work);
}

}  // namespace

int64_t set_isa(int64_t isa) { return vec::set_isa(isa); }

double uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>((static_cast<uint64_t>(c0) << 32 | c1) >> 11) * 0x1.0p-53;
}

int64_t sample_row(float* logits, int64_t vocab, const RowParameters& p, Workspace& work, float* logprob,
                   int64_t* top_ids, float* top_logprobs) {
  const bool adjusted = p.penalty_size > 0 || p.bias_size > 0;
  const bool reported = p.num_logprobs >= 0;
  double normalizer = 0;
  if (reported || !adjusted) {
    if (!find_group_maxima(logits, vocab, work.groups)) return -1;
    const float max = highest(work.groups);
    if (max == -kInfinity) return -1;
    if (reported) {
      const Weigher w{max, 1.0f, kUnderflow, -kInfinity, static_cast<int32_t>(vocab)};
      normalizer = static_cast<double>(max) + std::log(sum_weights(logits, vocab, w, work.sums));
      const int64_t n = std::min(p.num_logprobs, vocab);
      if (n > 0) {
        select_top(logits, vocab, n, w, work);
        std::sort(work.candidates.begin(), work.candidates.end(), before);
        for (int64_t i = 0; i < n; ++i) {
          top_ids[i] = work.candidates[i].id();
          top_logprobs[i] = static_cast<float>(static_cast<double>(work.candidates[i].logit()) - normalizer);
        }
      }
    }
  }
  int64_t token;
  if (adjusted) {
    adjust(logits, p, work);
    token = find_group_maxima(logits, vocab, work.groups) ? choose(logits, vocab, p, work) : -1;
    restore(logits, p, work);
  } else {
    token = choose(logits, vocab, p, work);
  }
  if (reported && token >= 0) *logprob = static_cast<float>(static_cast<double>(logits[token]) - normalizer);
  return token;
}

}  // namespace sextant::sampling
