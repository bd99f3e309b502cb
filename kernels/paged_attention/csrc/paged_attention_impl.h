// Definitions behind paged_attention.h: the choice of an instruction set, the cutting of a batch into work items and
// their distribution over threads. None of these choices changes a bit of the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>

#include "simd/csrc/cpu_isa.h"

namespace sextant {
namespace paged_attention_detail {
namespace {

#define SEXTANT_VEC_LOOPS "paged_attention/csrc/paged_attention_isa.h"
#include "simd/csrc/vector_dispatch.h"
#undef SEXTANT_VEC_LOOPS

// Loops of one instruction set. bf16 travels as uint16_t.
template <typename KV>
struct Loops {
  decltype(&portable::scores_any<KV>) scores;
  decltype(&portable::exponentiate) exponentiate;
  decltype(&portable::weigh_any<KV>) weigh;
};

template <typename KV>
Loops<KV> loops() {
#ifdef SEXTANT_VEC_X86
  const auto isa = static_cast<vec::Isa>(vec::isa_in_use().load(std::memory_order_relaxed));
  if (isa == vec::Isa::kAvx512) return {&avx512::scores_any<KV>, &avx512::exponentiate, &avx512::weigh_any<KV>};
  if (isa == vec::Isa::kAvx2) return {&avx2::scores_any<KV>, &avx2::exponentiate, &avx2::weigh_any<KV>};
#endif
  return {&portable::scores_any<KV>, &portable::exponentiate, &portable::weigh_any<KV>};
}

// Scratch memory that lives as long as its thread, 64-byte aligned: a step allocates nothing once it has grown.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      const int64_t wanted = floats + floats / 2;
      size_ = 0;
      buffer_.reset(static_cast<float*>(std::aligned_alloc(64, (wanted * 4 + 63) / 64 * 64)));
      if (!buffer_) throw std::bad_alloc();
      size_ = wanted;
    }
    return buffer_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> buffer_;
  int64_t size_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

constexpr int kMaxRows = 6;  // 6 rows x 4 vectors of accumulators + 4 loads fit 32 registers

// Up to kMaxRows query rows of one sequence and one KV head, (token, head in group) in token-major order.
struct Item {
  int32_t sequence;
  int32_t kv_head;
  int32_t row;      // first row: token * group + head
  int32_t rows;
  int32_t blocks;   // of the longest row
  int64_t cost() const { return static_cast<int64_t>(blocks) * (rows + 2); }  // each block is loaded once for all rows
};

template <typename KV>
struct Problem {
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  const KV* kv;
  int64_t block_stride;
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* query_start;
  const int32_t* context_len;
  int64_t num_seqs, heads, kv_heads, dim;
  float scale;
  Loops<KV> loops;

  int64_t group() const { return heads / kv_heads; }
  const int32_t* table(const Item& item) const { return block_table + item.sequence * table_stride; }
  const KV* keys(const Item& item) const { return kv + item.kv_head * dim * 16; }
  const KV* values(const Item& item) const { return kv + (kv_heads + item.kv_head) * dim * 16; }

  // Positions that each row of the item sees, and where its output goes.
  void describe(const Item& item, int32_t* limit, float** out_rows) const {
    const int32_t begin = query_start[item.sequence];
    const int32_t tokens = query_start[item.sequence + 1] - begin;
    const int64_t g = group();
    for (int r = 0; r < item.rows; ++r) {
      const int64_t token = (item.row + r) / g;
      const int64_t head = item.kv_head * g + (item.row + r) % g;
      limit[r] = context_len[item.sequence] - tokens + static_cast<int32_t>(token) + 1;
      out_rows[r] = out + (begin + token) * out_stride + head * dim;
    }
  }

  // q * scale of the item's rows, packed [rows][dim].
  void scale_queries(const Item& item, float* packed) const {
    const int64_t g = group();
    for (int r = 0; r < item.rows; ++r) {
      const int64_t token = query_start[item.sequence] + (item.row + r) / g;
      const float* row = q + token * q_stride + (item.kv_head * g + (item.row + r) % g) * dim;
      for (int64_t d = 0; d < dim; ++d) packed[r * dim + d] = row[d] * scale;
    }
  }

  void run(const Item& item) const {
    const int64_t stride = static_cast<int64_t>(item.blocks) * 16;
    float* packed = thread_scratch().get(item.rows * (stride + dim));
    float* s = packed + item.rows * dim;
    int32_t limit[kMaxRows];
    float* rows[kMaxRows];
    float top[kMaxRows], sum[kMaxRows];
    describe(item, limit, rows);
    scale_queries(item, packed);
    std::fill(top, top + kMaxRows, -INFINITY);
    loops.scores(item.rows, packed, dim, keys(item), block_stride, table(item), 0, item.blocks, limit, s, stride, top);
    for (int r = 0; r < item.rows; ++r)
      sum[r] = loops.exponentiate(s + r * stride, s + r * stride, (limit[r] + 15) / 16, top[r]);
    loops.weigh(item.rows, s, stride, values(item), dim, block_stride, table(item), limit, sum, rows, 0, dim);
  }
};

inline std::vector<Item> cut(const int32_t* query_start, const int32_t* context_len, int64_t num_seqs, int64_t kv_heads,
                             int64_t group) {
  std::vector<Item> items;
  for (int64_t s = 0; s < num_seqs; ++s) {
    const int64_t tokens = query_start[s + 1] - query_start[s];
    const int64_t rows = tokens * group;
    const int64_t pieces = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t lo = i * rows / pieces, hi = (i + 1) * rows / pieces;
        const int64_t positions = context_len[s] - tokens + (hi - 1) / group + 1;
        items.push_back({static_cast<int32_t>(s), static_cast<int32_t>(h), static_cast<int32_t>(lo),
                         static_cast<int32_t>(hi - lo), static_cast<int32_t>((positions + 15) / 16)});
      }
  }
  return items;
}

// How many of the items (sorted, most expensive first) are worth cutting over all threads: whole items are dealt
// greedily, the cut ones add an equal share to every thread, and the shortest finish wins. One long sequence with three
// KV heads on two threads would otherwise leave a thread idle for a third of the time.
inline int64_t items_to_split(const std::vector<Item>& items, int64_t threads, int64_t dim) {
  const int64_t n = static_cast<int64_t>(items.size());
  if (threads < 2 || n > 8 * threads) return 0;
  constexpr int64_t kWorthwhile = 128;  // cost (about 25 blocks of 3 rows) that pays for one more barrier
  const double shares = static_cast<double>(std::min(threads, dim / 16));
  double best = INFINITY;
  int64_t best_split = 0;
  std::vector<double> load(threads);
  for (int64_t split = 0; split <= std::min(n, 2 * threads); ++split) {
    std::fill(load.begin(), load.end(), 0.0);
    for (int64_t i = split; i < n; ++i) *std::min_element(load.begin(), load.end()) += items[i].cost();
    double cut_cost = 0;
    for (int64_t i = 0; i < split; ++i) cut_cost += items[i].cost();
    // half of an item is scores (over positions), half values (over columns), plus a tenth of softmax done by each
    const double finish = *std::max_element(load.begin(), load.end()) +
                          cut_cost * (0.5 / threads + 0.5 / shares + 0.1) + (split > 0 ? kWorthwhile : 0);
    if (finish < best) {
      best = finish;
      best_split = split;
    }
  }
  return best_split;
}

// Items whose scores were computed by several threads: where they lie and each part's maximum.
struct Split {
  float* s;
  float* packed;
  std::vector<float> top;  // [parts][kMaxRows]
};

template <typename KV>
void run_items(const Problem<KV>& problem, std::vector<Item>& items, int64_t threads) {
  if (threads < 2) {
    for (const Item& item : items) problem.run(item);
    return;
  }
  // The most expensive first, so that the last to end is short; ties stay in (sequence, head) order for the caches.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
  const int64_t n = static_cast<int64_t>(items.size());
  const int64_t split = items_to_split(items, threads, problem.dim);
  const int64_t parts = threads;
  static thread_local Scratch shared;
  std::vector<Split> splits(split);
  int64_t floats = 0;
  for (int64_t i = 0; i < split; ++i) floats += items[i].rows * (items[i].blocks * 16 + problem.dim);
  float* memory = split > 0 ? shared.get(floats) : nullptr;
  for (int64_t i = 0; i < split; ++i) {
    splits[i].packed = memory;
    splits[i].s = memory + items[i].rows * problem.dim;
    splits[i].top.assign(parts * kMaxRows, -INFINITY);
    problem.scale_queries(items[i], splits[i].packed);
    memory += items[i].rows * (items[i].blocks * 16 + problem.dim);
  }
  // First the parts of the split items' scores, then the whole items: whoever is free takes the next.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < split * parts + n - split;) {
      if (unit >= split * parts) {
        problem.run(items[unit - split * parts + split]);
        continue;
      }
      const Item& item = items[unit / parts];
      Split& piece = splits[unit / parts];
      const int64_t part = unit % parts;
      int32_t limit[kMaxRows];
      float* rows[kMaxRows];
      problem.describe(item, limit, rows);
      problem.loops.scores(item.rows, piece.packed, problem.dim, problem.keys(item), problem.block_stride,
                           problem.table(item), part * item.blocks / parts, (part + 1) * item.blocks / parts, limit,
                           piece.s, item.blocks * 16, piece.top.data() + part * kMaxRows);
    }
  });
  if (split == 0) return;
  // Then the columns of the split items' outputs; every part repeats the item's softmax rather than wait for another.
  const int64_t columns = std::min(parts, problem.dim / 16);
  std::atomic<int64_t> next_columns{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next_columns.fetch_add(1, std::memory_order_relaxed)) < split * columns;) {
      const Item& item = items[unit / columns];
      const Split& piece = splits[unit / columns];
      const int64_t stride = static_cast<int64_t>(item.blocks) * 16;
      float* p = thread_scratch().get(item.rows * stride);
      int32_t limit[kMaxRows];
      float* rows[kMaxRows];
      float sum[kMaxRows];
      problem.describe(item, limit, rows);
      for (int r = 0; r < item.rows; ++r) {
        float top = -INFINITY;
        for (int64_t part = 0; part < parts; ++part) top = std::max(top, piece.top[part * kMaxRows + r]);
        sum[r] = problem.loops.exponentiate(piece.s + r * stride, p + r * stride, (limit[r] + 15) / 16, top);
      }
      const int64_t tiles = problem.dim / 16, part = unit % columns;
      problem.loops.weigh(item.rows, p, stride, problem.values(item), problem.dim, problem.block_stride,
                          problem.table(item), limit, sum, rows, part * tiles / columns * 16,
                          (part + 1) * tiles / columns * 16);
    }
  });
}

inline void convert(const float* from, float* to, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
}
inline void convert(const float* from, c10::BFloat16* to, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = c10::BFloat16(from[i]);
}

inline const float* raw(const float* p) { return p; }
inline const uint16_t* raw(const c10::BFloat16* p) { return reinterpret_cast<const uint16_t*>(p); }

}  // namespace
}  // namespace paged_attention_detail

template <typename KV>
void write_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, KV* kv_layer, int64_t block_stride,
              const int32_t* block_table, int64_t table_stride, const int32_t* query_start, const int32_t* context_len,
              int64_t num_seqs, int64_t kv_heads, int64_t head_dim) {
  const auto write = [&](int64_t s, int64_t t) {
    const int64_t position = context_len[s] - query_start[s + 1] + t;
    KV* block = kv_layer + block_table[s * table_stride + position / 16] * block_stride;
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t head = h * head_dim;
      paged_attention_detail::convert(k + t * k_stride + head, block + head * 16 + position % 16, head_dim, 16);
      paged_attention_detail::convert(v + t * v_stride + head,
                                      block + (kv_heads + h) * head_dim * 16 + position % 16 * head_dim, head_dim, 1);
    }
  };
  const int64_t tokens = num_seqs > 0 ? query_start[num_seqs] : 0;
  at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
    int64_t s = std::upper_bound(query_start, query_start + num_seqs + 1, static_cast<int32_t>(begin)) - query_start - 1;
    for (int64_t t = begin; t < end; ++t) {
      while (t >= query_start[s + 1]) ++s;
      write(s, t);
    }
  });
}

template <typename KV>
void paged_attention(const float* q, int64_t q_stride, float* out, int64_t out_stride, const KV* kv_layer,
                     int64_t block_stride, const int32_t* block_table, int64_t table_stride,
                     const int32_t* query_start, const int32_t* context_len, int64_t num_seqs, int64_t heads,
                     int64_t kv_heads, int64_t head_dim, float scale) {
  namespace detail = paged_attention_detail;
  using Raw = std::remove_cv_t<std::remove_pointer_t<decltype(detail::raw(kv_layer))>>;
  const detail::Problem<Raw> problem{q,           q_stride,    out,      out_stride, detail::raw(kv_layer), block_stride,
                                     block_table, table_stride, query_start, context_len, num_seqs, heads,
                                     kv_heads,    head_dim,    scale,    detail::loops<Raw>()};
  auto items = detail::cut(query_start, context_len, num_seqs, kv_heads, heads / kv_heads);
  int64_t cost = 0;
  for (const auto& item : items) cost += item.cost();
  constexpr int64_t kSerial = 64;  // cost below which waking threads takes longer than the work
  const int64_t threads = cost < kSerial || at::in_parallel_region() ? 1 : at::get_num_threads();
  detail::run_items(problem, items, threads);
}

}  // namespace sextant
