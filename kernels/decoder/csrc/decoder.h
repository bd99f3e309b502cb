// The whole decoder stack of a Llama-shaped model on the CPU: embedding to logits in one call, composed from the headers of
// linear, elementwise and paged_attention. Composing the single ops gives the same bits; one call saves their overhead and
// releases Python's lock for the whole step. The threads are started once a step and walk through it together (team.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <sys/mman.h>

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include "decoder/csrc/attention_work.h"
#include "decoder/csrc/matrix.h"
#include "decoder/csrc/team.h"
#include "elementwise/csrc/elementwise.h"
#include "linear/csrc/linear.h"
#include "paged_attention/csrc/paged_attention.h"

namespace sextant {

struct DecoderShape {
  int64_t hidden, layers, heads, kv_heads, head_dim, ffn, vocab;
  float rms_eps;
  bool rope_interleaved;
};

struct DecoderLayer {
  const float* attention_norm;
  DecoderMatrix qkv;
  const float* qkv_bias;  // may be null
  const float* q_norm;    // per-head RMSNorm of q and k (Qwen3); may be null
  const float* k_norm;
  DecoderMatrix out;
  const float* ffn_norm;
  DecoderMatrix gate_up;  // gate's columns, then up's
  DecoderMatrix down;
};

// One batch; see actors/llumnix/engine/batch.py. Everything was checked by the caller.
struct DecoderBatch {
  const int64_t* token_ids;
  const int32_t* positions;
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* block_table;
  int64_t table_stride, tokens, sequences;
  const int64_t* logits_rows;
  int64_t num_logits_rows;
};

// Scratch memory that lives as long as the stack and only grows; in huge pages when it is large.
class AlignedBuffer {
 public:
  template <typename T>
  T* get(int64_t count) {
    const int64_t wanted = count * static_cast<int64_t>(sizeof(T));
    const int64_t alignment = wanted >= kHugePage ? kHugePage : 4096;
    const int64_t bytes = (wanted + alignment - 1) / alignment * alignment;
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(std::aligned_alloc(alignment, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
#ifdef MADV_HUGEPAGE
      if (alignment == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  static constexpr int64_t kHugePage = int64_t{2} << 20;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

class DecoderStack {
 public:
  DecoderShape shape;
  std::vector<DecoderLayer> layers;
  const float* embedding_f32 = nullptr;  // [vocab][hidden], or in bf16:
  const c10::BFloat16* embedding_bf16 = nullptr;
  const float* final_norm = nullptr;
  DecoderMatrix lm_head;
  const float* rope_table = nullptr;  // [positions][2][head_dim / 2]

  // logits [num_logits_rows][vocab]; writes the keys and values of all tokens. `kv` is the pool's first element,
  // `layer_stride` and `block_stride` its strides in elements.
  template <typename KV>
  void forward(const DecoderBatch& batch, KV* kv, int64_t block_stride, int64_t layer_stride, float* logits) {
    const std::lock_guard<std::mutex> guard(mutex_);  // the scratch memory belongs to one step at a time
    const Scratch s = scratch(batch);
    const int64_t tokens = batch.tokens, hidden = shape.hidden, dim = shape.head_dim;
    const int64_t q_size = shape.heads * dim, kv_size = shape.kv_heads * dim, qkv_size = q_size + 2 * kv_size;
    AttentionWork attention(batch.query_start, batch.context_len, batch.sequences, shape.heads, shape.kv_heads, dim,
                            Team::size());
    Team::run([&](Team::Member& member) {
      member.spread(tokens, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) embed(batch.token_ids[t], s.h + t * hidden);
      });
      for (int64_t l = 0; l < shape.layers; ++l) {
        const DecoderLayer& layer = layers[l];
        KV* pool = kv + l * layer_stride;
        const auto norm_with = [&](const float* weight) {
          return [&, weight](int64_t t, float* to) { rms_norm_row(s.h + t * hidden, weight, hidden, shape.rms_eps, to); };
        };
        linear(member, layer.qkv, s, tokens, s.qkv, layer.qkv_bias, false, norm_with(layer.attention_norm));
        member.spread(tokens, [&](int64_t first, int64_t last) {
          for (int64_t t = first; t < last; ++t) {
            float* row = s.qkv + t * qkv_size;
            rotate(layer, batch.positions[t], row);
            const int32_t one[] = {0, 1}, context = batch.positions[t] + 1;
            write_kv(row + q_size, qkv_size, row + q_size + kv_size, qkv_size, pool, block_stride,
                     batch.block_table + sequence_of_[t] * batch.table_stride, batch.table_stride, one, &context, 1,
                     shape.kv_heads, dim);
          }
        });
        attention.run(member, problem(batch, s, static_cast<const KV*>(pool), block_stride));
        prepared_linear(member, layer.out, s, s.attention, tokens, s.h);
        linear(member, layer.gate_up, s, tokens, s.gate_up, nullptr, false, norm_with(layer.ffn_norm));
        linear(member, layer.down, s, tokens, s.h, nullptr, true, [&](int64_t t, float* to) {
          const float* gate = s.gate_up + t * 2 * shape.ffn;
          silu_mul_row(gate, gate + shape.ffn, shape.ffn, to);
        });
      }
      linear(member, lm_head, s, batch.num_logits_rows, logits, nullptr, false, [&](int64_t r, float* to) {
        rms_norm_row(s.h + batch.logits_rows[r] * hidden, final_norm, hidden, shape.rms_eps, to);
      });
    });
  }

 private:
  struct Scratch {
    float *h, *qkv, *attention, *gate_up, *rows, *scales;
    char* prepared;
  };

  // Everything a step writes to, made before its threads begin.
  Scratch scratch(const DecoderBatch& batch) {
    const int64_t tokens = batch.tokens, rows = std::max(tokens, batch.num_logits_rows);
    const int64_t q_size = shape.heads * shape.head_dim, kv_size = shape.kv_heads * shape.head_dim;
    int64_t stride = lm_head.stride();
    for (const DecoderLayer& layer : layers)
      for (const DecoderMatrix* w : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) stride = std::max(stride, w->stride());
    sequence_of_.resize(tokens);
    for (int64_t q = 0; q < batch.sequences; ++q)
      std::fill(sequence_of_.begin() + batch.query_start[q], sequence_of_.begin() + batch.query_start[q + 1], q);
    return {h_.get<float>(tokens * shape.hidden),
            qkv_.get<float>(tokens * (q_size + 2 * kv_size)),
            attention_.get<float>(tokens * q_size),
            gate_up_.get<float>(tokens * 2 * shape.ffn),
            rows_.get<float>(rows * std::max({shape.hidden, q_size, shape.ffn})),
            scales_.get<float>(rows),
            prepared_.get<char>(rows * stride)};
  }

  void embed(int64_t token, float* out) const {
    if (embedding_f32) {
      std::memcpy(out, embedding_f32 + token * shape.hidden, static_cast<size_t>(shape.hidden) * 4);
    } else {
      const c10::BFloat16* row = embedding_bf16 + token * shape.hidden;
      for (int64_t i = 0; i < shape.hidden; ++i) out[i] = static_cast<float>(row[i]);
    }
  }

  // y = rows W^T (+ bias) (+ y), where make(r, to) writes row r's inputs.
  template <typename Make>
  static void linear(Team::Member& member, const DecoderMatrix& w, const Scratch& s, int64_t rows, float* y,
                     const float* bias, bool accumulate, const Make& make) {
    const int64_t stride = w.stride(), inputs = w.inputs();
    member.spread(rows, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float* row = s.rows + r * inputs;
        make(r, row);
        if (stride > 0) s.scales[r] = w.prepare(row, s.prepared + r * stride);
      }
    });
    w.multiply(member, stride > 0 ? static_cast<const void*>(s.prepared) : s.rows, s.scales, rows, y, bias, accumulate);
  }

  // y += x W^T
  static void prepared_linear(Team::Member& member, const DecoderMatrix& w, const Scratch& s, const float* x, int64_t rows,
                              float* y) {
    const int64_t stride = w.stride(), inputs = w.inputs();
    if (stride > 0)
      member.spread(rows, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) s.scales[r] = w.prepare(x + r * inputs, s.prepared + r * stride);
      });
    w.multiply(member, stride > 0 ? static_cast<const void*>(s.prepared) : x, s.scales, rows, y, nullptr, true);
  }

  template <typename KV>
  auto problem(const DecoderBatch& b, const Scratch& s, const KV* pool, int64_t block_stride) const {
    namespace detail = paged_attention_detail;
    using Raw = std::remove_cv_t<std::remove_pointer_t<decltype(detail::raw(pool))>>;
    const int64_t q_size = shape.heads * shape.head_dim, qkv_size = q_size + 2 * shape.kv_heads * shape.head_dim;
    return detail::Problem<Raw>{s.qkv,          qkv_size,       s.attention,   q_size,        detail::raw(pool),
                                block_stride,   b.block_table,  b.table_stride, b.query_start, b.context_len,
                                b.sequences,    shape.heads,    shape.kv_heads, shape.head_dim,
                                1.0f / std::sqrt(static_cast<float>(shape.head_dim)), detail::loops<Raw>()};
  }

  // Query and key heads of one token's row, normed where the model does so, turned by its position.
  void rotate(const DecoderLayer& layer, int32_t position, float* row) const {
    const int64_t dim = shape.head_dim;
    const float* cosine = rope_table + position * dim;
    for (int64_t head = 0; head < shape.heads + shape.kv_heads; ++head) {
      float* x = row + head * dim;
      const float* norm = head < shape.heads ? layer.q_norm : layer.k_norm;
      if (norm) rms_norm_row(x, norm, dim, shape.rms_eps, x);
      rope_head(x, cosine, cosine + dim / 2, dim, shape.rope_interleaved);
    }
  }

  std::mutex mutex_;
  std::vector<int64_t> sequence_of_;  // of each token
  AlignedBuffer h_, qkv_, attention_, gate_up_, rows_, scales_, prepared_;
};

}  // namespace sextant
