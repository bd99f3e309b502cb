// The whole decoder stack of a Llama-shaped model on the CPU: embedding to logits in one call, composed from the headers of
// linear, elementwise and paged_attention. Composing the single ops gives the same bits; one call saves their overhead and
// releases Python's lock for the whole step.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

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
  PackedLinear qkv;
  const float* qkv_bias;  // may be null
  const float* q_norm;    // per-head RMSNorm of q and k (Qwen3); may be null
  const float* k_norm;
  PackedLinear out;
  const float* ffn_norm;
  PackedLinear gate_up;  // gate's columns, then up's
  PackedLinear down;
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

class AlignedBuffer {
 public:
  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 4095) / 4096 * 4096;
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(std::aligned_alloc(4096, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
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
  PackedLinear lm_head;
  const float* rope_table = nullptr;  // [positions][2][head_dim / 2]

  // logits [num_logits_rows][vocab]; writes the keys and values of all tokens. `kv` is the pool's first element,
  // `layer_stride` and `block_stride` its strides in elements.
  template <typename KV>
  void forward(const DecoderBatch& batch, KV* kv, int64_t block_stride, int64_t layer_stride, float* logits) {
    std::lock_guard<std::mutex> guard(mutex_);  // the scratch memory belongs to one step at a time
    const int64_t tokens = batch.tokens, hidden = shape.hidden, dim = shape.head_dim;
    const int64_t q_size = shape.heads * dim, kv_size = shape.kv_heads * dim, qkv_size = q_size + 2 * kv_size;
    float* h = h_.get<float>(tokens * hidden);
    float* qkv = qkv_.get<float>(tokens * qkv_size);
    float* attention = attention_.get<float>(tokens * q_size);
    float* gate_up = gate_up_.get<float>(tokens * 2 * shape.ffn);
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));

    for (int64_t t = 0; t < tokens; ++t) embed(batch.token_ids[t], h + t * hidden);
    for (int64_t l = 0; l < shape.layers; ++l) {
      const DecoderLayer& layer = layers[l];
      KV* pool = kv + l * layer_stride;
      normed_linear(layer.qkv, h, hidden, tokens, layer.attention_norm, qkv, layer.qkv_bias, false);
      rotate(layer, batch, qkv, qkv_size);
      write_kv(qkv + q_size, qkv_size, qkv + q_size + kv_size, qkv_size, pool, block_stride, batch.block_table,
               batch.table_stride, batch.query_start, batch.context_len, batch.sequences, shape.kv_heads, dim);
      paged_attention(qkv, qkv_size, attention, q_size, static_cast<const KV*>(pool), block_stride, batch.block_table,
                      batch.table_stride, batch.query_start, batch.context_len, batch.sequences, shape.heads,
                      shape.kv_heads, dim, scale);
      plain_linear(layer.out, attention, q_size, tokens, h);
      normed_linear(layer.gate_up, h, hidden, tokens, layer.ffn_norm, gate_up, nullptr, false);
      gated_linear(layer.down, gate_up, tokens, h);
    }
    const int64_t rows = batch.num_logits_rows;
    float* last = last_.get<float>(rows * hidden);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(last + r * hidden, h + batch.logits_rows[r] * hidden, static_cast<size_t>(hidden) * 4);
    normed_linear(lm_head, last, hidden, rows, final_norm, logits, nullptr, false);
  }

 private:
  void embed(int64_t token, float* out) const {
    if (embedding_f32) {
      std::memcpy(out, embedding_f32 + token * shape.hidden, static_cast<size_t>(shape.hidden) * 4);
    } else {
      const c10::BFloat16* row = embedding_bf16 + token * shape.hidden;
      for (int64_t i = 0; i < shape.hidden; ++i) out[i] = static_cast<float>(row[i]);
    }
  }

  // Applies `make(row, destination)` (fp32 row of w.k values) to every row, prepares it for `w`, and multiplies.
  template <typename Make>
  void linear_of(const PackedLinear& w, int64_t rows, float* y, const float* bias, bool accumulate, const Make& make) {
    const int64_t stride = prepared_stride(w);
    float* normed = normed_.get<float>(rows * w.k);
    float* scales = scales_.get<float>(rows);
    char* prepared = stride > 0 ? prepared_.get<char>(rows * stride) : reinterpret_cast<char*>(normed);
    at::parallel_for(0, rows, 8, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float* row = normed + r * w.k;
        make(r, row);
        if (stride > 0) scales[r] = prepare_row(w, row, prepared + r * stride);
      }
    });
    linear_prepared(w, prepared, stride > 0 ? stride : w.k * 4, scales, rows, y, w.n, bias, accumulate);
  }

  void normed_linear(const PackedLinear& w, const float* x, int64_t n, int64_t rows, const float* norm, float* y,
                     const float* bias, bool accumulate) {
    linear_of(w, rows, y, bias, accumulate,
              [&](int64_t r, float* to) { rms_norm_row(x + r * n, norm, n, shape.rms_eps, to); });
  }

  void plain_linear(const PackedLinear& w, const float* x, int64_t n, int64_t rows, float* y) {
    linear_of(w, rows, y, nullptr, true,
              [&](int64_t r, float* to) { std::memcpy(to, x + r * n, static_cast<size_t>(n) * 4); });
  }

  void gated_linear(const PackedLinear& w, const float* gate_up, int64_t rows, float* y) {
    const int64_t n = shape.ffn;
    linear_of(w, rows, y, nullptr, true, [&](int64_t r, float* to) {
      silu_mul_row(gate_up + r * 2 * n, gate_up + r * 2 * n + n, n, to);
    });
  }

  void rotate(const DecoderLayer& layer, const DecoderBatch& batch, float* qkv, int64_t row_size) const {
    const int64_t dim = shape.head_dim;
    at::parallel_for(0, batch.tokens, 8, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const float* cosine = rope_table + batch.positions[t] * dim;
        for (int64_t head = 0; head < shape.heads + shape.kv_heads; ++head) {
          float* x = qkv + t * row_size + head * dim;
          const float* norm = head < shape.heads ? layer.q_norm : layer.k_norm;
          if (norm) rms_norm_row(x, norm, dim, shape.rms_eps, x);
          rope_head(x, cosine, cosine + dim / 2, dim, shape.rope_interleaved);
        }
      }
    });
  }

  std::mutex mutex_;
  AlignedBuffer h_, qkv_, attention_, gate_up_, last_, normed_, scales_, prepared_;
};

}  // namespace sextant
