// Torch class over decoder.h: sextant.Decoder holds the weights, and the op sextant::decoder_forward runs one batch.
#include "decoder/csrc/decoder.h"

#include "balanced/csrc/balanced_lanes.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

namespace {

using sextant::DecoderLayer;
using sextant::DecoderMatrix;
using sextant::PackedLinear;

constexpr size_t kTensorsPerLayer = 17;
constexpr size_t kMatricesPerLayer = 4;
constexpr int64_t kBalanced = 3;  // the kind that follows kernels.linear's

class Decoder : public torch::CustomClassHolder {
 public:
  // integers: hidden, layers, heads, kv_heads, head_dim, ffn, vocab, rope_interleaved; kinds: (kind, tile, index) of lm_head
  // and of each layer's qkv, out, gate_up, down; tile and index belong to balanced ones.
  // tensors: embedding, final_norm, rope_table, lm_head (data, scales, offsets; balanced: values, index, scales), then for each
  // layer attention_norm, qkv (3), qkv_bias, q_norm, k_norm, out (3), ffn_norm, gate_up (3), down (3); an absent one is empty.
  Decoder(std::vector<int64_t> integers, double rms_eps, std::vector<int64_t> kinds, std::vector<at::Tensor> tensors)
      : tensors_(std::move(tensors)), kinds_(std::move(kinds)) {
    TORCH_CHECK_VALUE(integers.size() == 8, "wrong number of settings");
    auto& s = stack_.shape;
    s = {integers[0], integers[1], integers[2], integers[3], integers[4], integers[5], integers[6],
         static_cast<float>(rms_eps), integers[7] != 0};
    TORCH_CHECK_VALUE(tensors_.size() == 6 + static_cast<size_t>(s.layers) * kTensorsPerLayer, "wrong number of weights");
    TORCH_CHECK_VALUE(kinds_.size() == 3 * (1 + static_cast<size_t>(s.layers) * kMatricesPerLayer), "wrong number of kinds");
    for (const at::Tensor& tensor : tensors_) TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), "weights must be contiguous on the CPU");
    TORCH_CHECK_VALUE(tensors_[0].dim() == 2 && tensors_[0].size(0) == s.vocab && tensors_[0].size(1) == s.hidden, "the embedding must be [vocab, hidden]");
    if (tensors_[0].scalar_type() == at::kFloat) {
      stack_.embedding_f32 = tensors_[0].data_ptr<float>();
    } else {
      stack_.embedding_bf16 = tensors_[0].data_ptr<at::BFloat16>();
    }
    stack_.final_norm = floats(tensors_[1], s.hidden);
    TORCH_CHECK_VALUE(tensors_[2].dim() == 3 && tensors_[2].size(1) == 2 && tensors_[2].size(2) * 2 == s.head_dim, "the rope table must be [positions, 2, head_dim / 2]");
    stack_.rope_table = tensors_[2].data_ptr<float>();
    positions_ = tensors_[2].size(0);
    stack_.lm_head = matrix(3, 0, s.vocab, s.hidden);
    const int64_t q_size = s.heads * s.head_dim, qkv_size = q_size + 2 * s.kv_heads * s.head_dim;
    for (int64_t l = 0; l < s.layers; ++l) {
      const size_t at = 6 + static_cast<size_t>(l) * kTensorsPerLayer;
      const size_t first = 1 + static_cast<size_t>(l) * kMatricesPerLayer;
      DecoderLayer layer;
      layer.attention_norm = floats(tensors_[at], s.hidden);
      layer.qkv = matrix(at + 1, first, qkv_size, s.hidden);
      layer.qkv_bias = optional_floats(tensors_[at + 4], qkv_size);
      layer.q_norm = optional_floats(tensors_[at + 5], s.head_dim);
      layer.k_norm = optional_floats(tensors_[at + 6], s.head_dim);
      layer.out = matrix(at + 7, first + 1, s.hidden, q_size);
      layer.ffn_norm = floats(tensors_[at + 10], s.hidden);
      layer.gate_up = matrix(at + 11, first + 2, 2 * s.ffn, s.hidden);
      layer.down = matrix(at + 14, first + 3, s.hidden, s.ffn);
      stack_.layers.push_back(layer);
    }
  }

  at::Tensor forward(const at::Tensor& kv, const at::Tensor& token_ids, const at::Tensor& positions,
                     const at::Tensor& query_start, const at::Tensor& context_len, const at::Tensor& block_table,
                     const at::Tensor& logits_rows) {
    const auto& s = stack_.shape;
    check(kv, token_ids, positions, query_start, context_len, block_table, logits_rows);
    const sextant::DecoderBatch batch{
        token_ids.data_ptr<int64_t>(),   positions.data_ptr<int32_t>(), query_start.data_ptr<int32_t>(),
        context_len.data_ptr<int32_t>(), block_table.data_ptr<int32_t>(), block_table.stride(0),
        token_ids.size(0),               context_len.size(0),           logits_rows.data_ptr<int64_t>(),
        logits_rows.size(0)};
    at::Tensor logits = at::empty({batch.num_logits_rows, s.vocab}, at::kFloat);
    if (batch.tokens == 0) return logits;
    float* out = logits.data_ptr<float>();
    if (kv.scalar_type() == at::kFloat) {
      stack_.forward(batch, kv.data_ptr<float>(), kv.stride(0), kv.stride(1), out);
    } else {
      stack_.forward(batch, kv.data_ptr<at::BFloat16>(), kv.stride(0), kv.stride(1), out);
    }
    return logits;
  }

 private:
  static const float* floats(const at::Tensor& tensor, int64_t size) {
    TORCH_CHECK_VALUE(tensor.numel() == size && tensor.scalar_type() == at::kFloat, "a vector of ", size, " float32 was expected, got ", tensor.sizes());
    return tensor.data_ptr<float>();
  }
  static const float* optional_floats(const at::Tensor& tensor, int64_t size) {
    return tensor.numel() == 0 ? nullptr : floats(tensor, size);
  }

  // The matrix whose three tensors begin at `at`; `which` counts matrices.
  DecoderMatrix matrix(size_t at, size_t which, int64_t n, int64_t k) const {
    const int64_t kind = kinds_[3 * which];
    TORCH_CHECK_VALUE(kind >= 0 && kind <= kBalanced, "unknown kind of weights");
    DecoderMatrix m;
    if (kind == kBalanced) {
      m.is_balanced = true;
      m.balanced = sextant::lanes_of(tensors_[at], tensors_[at + 1], tensors_[at + 2], n, k, kinds_[3 * which + 1], kinds_[3 * which + 2]);
    } else {
      m.dense = packed(at, kind, n, k);
    }
    return m;
  }

  PackedLinear packed(size_t at, int64_t kind, int64_t n, int64_t k) const {
    PackedLinear w;
    w.kind = static_cast<sextant::LinearKind>(kind);
    w.n = n;
    w.k = k;
    TORCH_CHECK_VALUE(static_cast<int64_t>(tensors_[at].nbytes()) == w.panels() * w.panel_bytes(), "a packed weight of ", n, " x ", k, " has ", tensors_[at].nbytes(), " bytes");
    w.data = static_cast<const char*>(tensors_[at].data_ptr());
    if (w.kind == sextant::LinearKind::kInt8) {
      w.scales = floats(tensors_[at + 1], w.panels() * sextant::kPanel);
      TORCH_CHECK_VALUE(tensors_[at + 2].numel() == w.panels() * sextant::kPanel, "an int8 weight lacks its offsets");
      w.offsets = tensors_[at + 2].data_ptr<int32_t>();
    }
    return w;
  }

  // Whatever a wrong batch could turn into a wild read or write.
  void check(const at::Tensor& kv, const at::Tensor& token_ids, const at::Tensor& positions, const at::Tensor& query_start,
             const at::Tensor& context_len, const at::Tensor& block_table, const at::Tensor& logits_rows) const {
    const auto& s = stack_.shape;
    TORCH_CHECK_VALUE(kv.dim() == 5 && kv.is_contiguous() && kv.size(1) == s.layers && kv.size(2) == 2 && kv.size(3) == s.kv_heads && kv.size(4) == s.head_dim * 16,
                      "kv must be contiguous [blocks, layers, 2, kv_heads, head_dim * 16], got ", kv.sizes());
    TORCH_CHECK_TYPE(kv.scalar_type() == at::kFloat || kv.scalar_type() == at::kBFloat16, "kv must be float32 or bfloat16");
    TORCH_CHECK_TYPE(token_ids.scalar_type() == at::kLong && logits_rows.scalar_type() == at::kLong && positions.scalar_type() == at::kInt &&
                         query_start.scalar_type() == at::kInt && context_len.scalar_type() == at::kInt && block_table.scalar_type() == at::kInt,
                     "the batch has tensors of a wrong dtype");
    for (const at::Tensor* tensor : {&token_ids, &positions, &query_start, &context_len, &logits_rows})
      TORCH_CHECK_VALUE(tensor->is_contiguous() && tensor->dim() == 1, "the batch's vectors must be contiguous");
    const int64_t tokens = token_ids.size(0), sequences = context_len.size(0);
    TORCH_CHECK_VALUE(positions.size(0) == tokens && query_start.size(0) == sequences + 1 && block_table.dim() == 2 &&
                          block_table.size(0) == sequences && block_table.stride(1) == 1, "the batch's shapes do not fit together");
    const int64_t* ids = token_ids.data_ptr<int64_t>();
    const int32_t *start = query_start.data_ptr<int32_t>(), *context = context_len.data_ptr<int32_t>(), *position = positions.data_ptr<int32_t>();
    for (int64_t t = 0; t < tokens; ++t) TORCH_CHECK_INDEX(ids[t] >= 0 && ids[t] < s.vocab, "token id ", ids[t], " is outside the vocabulary");
    TORCH_CHECK_VALUE(start[0] == 0 && start[sequences] == tokens, "query_start must run from 0 to the number of tokens");
    for (int64_t q = 0; q < sequences; ++q) {
      const int32_t length = start[q + 1] - start[q];
      TORCH_CHECK_VALUE(length >= 0 && context[q] >= length && context[q] <= positions_, "sequence ", q, ": ", length, " tokens of a context of ", context[q], " (at most ", positions_, ")");
      for (int32_t i = 0; i < length; ++i)
        TORCH_CHECK_VALUE(position[start[q] + i] == context[q] - length + i, "sequence ", q, ": positions must end at its context length");
      TORCH_CHECK_VALUE((context[q] + 15) / 16 <= block_table.size(1), "sequence ", q, ": block_table is too short");
      const int32_t* row = block_table.data_ptr<int32_t>() + q * block_table.stride(0);
      for (int64_t b = 0; b < (context[q] + 15) / 16; ++b) TORCH_CHECK_INDEX(row[b] >= 0 && row[b] < kv.size(0), "sequence ", q, ": block ", row[b], " is outside the pool");
    }
    for (int64_t r = 0; r < logits_rows.size(0); ++r)
      TORCH_CHECK_INDEX(logits_rows.data_ptr<int64_t>()[r] >= 0 && logits_rows.data_ptr<int64_t>()[r] < tokens, "logits row out of range");
  }

  std::vector<at::Tensor> tensors_;  // keeps the memory that stack_ points into
  std::vector<int64_t> kinds_;
  sextant::DecoderStack stack_;
  int64_t positions_ = 0;
};

at::Tensor decoder_forward(const c10::intrusive_ptr<Decoder>& decoder, const at::Tensor& kv, const at::Tensor& token_ids,
                           const at::Tensor& positions, const at::Tensor& query_start, const at::Tensor& context_len,
                           const at::Tensor& block_table, const at::Tensor& logits_rows) {
  return decoder->forward(kv, token_ids, positions, query_start, context_len, block_table, logits_rows);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.class_<Decoder>("Decoder").def(torch::init<std::vector<int64_t>, double, std::vector<int64_t>, std::vector<at::Tensor>>());
  m.def("decoder_forward(__torch__.torch.classes.sextant.Decoder decoder, Tensor(a!) kv, Tensor token_ids, Tensor positions, Tensor query_start, Tensor context_len, Tensor block_table, Tensor logits_rows) -> Tensor",
        &decoder_forward);
}
