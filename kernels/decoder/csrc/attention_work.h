// Paged attention as units of work for a team of threads: the loops are those of kernels/paged_attention, and so are the bits;
// here a batch is cut once for all layers, because its shape is the same in each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decoder/csrc/team.h"
#include "paged_attention/csrc/paged_attention.h"

namespace sextant {

class AttentionWork {
 public:
  AttentionWork(const int32_t* query_start, const int32_t* context_len, int64_t sequences, int64_t heads, int64_t kv_heads,
                int64_t dim, int64_t threads)
      : dim_(dim), parts_(threads), items_(paged_attention_detail::cut(query_start, context_len, sequences, kv_heads, heads / kv_heads)) {
    if (threads < 2) return;
    // The most expensive first, so that the last to end is short; ties stay in (sequence, head) order for the caches.
    std::stable_sort(items_.begin(), items_.end(), [](const auto& a, const auto& b) { return a.cost() > b.cost(); });
    splits_.resize(paged_attention_detail::items_to_split(items_, threads, dim));
    int64_t floats = 0;
    for (size_t i = 0; i < splits_.size(); ++i) {
      splits_[i].scores = floats;
      splits_[i].top.resize(parts_ * paged_attention_detail::kMaxRows);
      floats += items_[i].rows * items_[i].blocks * 16;
    }
    scores_.resize(floats);
  }

  // Attention of one layer; every member of the team calls it.
  template <typename KV>
  void run(Team::Member& member, const paged_attention_detail::Problem<KV>& problem) {
    const int64_t split = static_cast<int64_t>(splits_.size()), whole = static_cast<int64_t>(items_.size()) - split;
    if (split > 0) {  // a few long items: their positions first, then their columns
      member.phase(split * parts_, 1, [&](int64_t unit, int64_t) { score(problem, unit / parts_, unit % parts_); });
      const int64_t tiles = std::min(parts_, dim_ / 16);
      member.phase(split * tiles + whole, 1, [&](int64_t unit, int64_t) {
        if (unit < split * tiles) {
          weigh(problem, unit / tiles, unit % tiles, tiles);
        } else {
          problem.run(items_[unit - split * tiles + split]);
        }
      });
      return;
    }
    const int64_t grain = member.threads() == 1 ? whole : std::max<int64_t>(1, whole / (16 * member.threads()));
    member.phase(whole, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) problem.run(items_[i]);
    });
  }

 private:
  using Item = paged_attention_detail::Item;

  struct Split {
    int64_t scores;          // first float of its scores
    std::vector<float> top;  // [parts][kMaxRows]: each part's maxima
  };

  // A part of a split item's positions.
  template <typename KV>
  void score(const paged_attention_detail::Problem<KV>& problem, int64_t index, int64_t part) {
    const Item& item = items_[index];
    int32_t limit[paged_attention_detail::kMaxRows];
    float* rows[paged_attention_detail::kMaxRows];
    problem.describe(item, limit, rows);
    float* packed = paged_attention_detail::thread_scratch().get(item.rows * dim_);
    problem.scale_queries(item, packed);
    float* top = splits_[index].top.data() + part * paged_attention_detail::kMaxRows;
    std::fill(top, top + paged_attention_detail::kMaxRows, -INFINITY);
    problem.loops.scores(item.rows, packed, dim_, problem.keys(item), problem.block_stride, problem.table(item),
                         part * item.blocks / parts_, (part + 1) * item.blocks / parts_, limit,
                         scores_.data() + splits_[index].scores, item.blocks * 16, top);
  }

  // Some columns of a split item's output; every part repeats the item's softmax rather than wait for another.
  template <typename KV>
  void weigh(const paged_attention_detail::Problem<KV>& problem, int64_t index, int64_t part, int64_t parts) {
    const Item& item = items_[index];
    const int64_t stride = static_cast<int64_t>(item.blocks) * 16;
    int32_t limit[paged_attention_detail::kMaxRows];
    float* rows[paged_attention_detail::kMaxRows];
    float sum[paged_attention_detail::kMaxRows];
    problem.describe(item, limit, rows);
    const float* scores = scores_.data() + splits_[index].scores;
    float* p = paged_attention_detail::thread_scratch().get(item.rows * stride);
    for (int r = 0; r < item.rows; ++r) {
      float top = -INFINITY;
      for (int64_t i = 0; i < parts_; ++i) top = std::max(top, splits_[index].top[i * paged_attention_detail::kMaxRows + r]);
      sum[r] = problem.loops.exponentiate(scores + r * stride, p + r * stride, (limit[r] + 15) / 16, top);
    }
    problem.loops.weigh(item.rows, p, stride, problem.values(item), dim_, problem.block_stride, problem.table(item), limit,
                        sum, rows, part * (dim_ / 16) / parts * 16, (part + 1) * (dim_ / 16) / parts * 16);
  }

  int64_t dim_, parts_;
  std::vector<Item> items_;
  std::vector<Split> splits_;
  std::vector<float> scores_;
};

}  // namespace sextant
