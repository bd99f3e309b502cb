// Torch ops over paged_attention.h: sextant::write_kv and sextant::paged_attention for CPU tensors.
#include "paged_attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

struct Pool {
  int64_t kv_heads, head_dim, block_stride;
};

// Checks whatever a wrong call could turn into a wild read or write, block indices included.
Pool check(const at::Tensor& rows, int64_t row_heads, const at::Tensor& kv, const at::Tensor& block_table,
           const at::Tensor& query_start, const at::Tensor& context_len) {
  TORCH_CHECK_VALUE(kv.dim() == 4 && kv.size(1) == 2, "kv_layer must have shape [num_blocks, 2, kv_heads, head_dim * 16]");
  TORCH_CHECK_VALUE(kv.size(3) % 256 == 0, "head_dim must be a multiple of 16 and the block size 16");
  TORCH_CHECK_VALUE(kv.stride(3) == 1 && kv.stride(2) == kv.size(3) && kv.stride(1) == kv.size(2) * kv.size(3),
                    "one block of a layer must be contiguous in kv_layer");
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.scalar_type() == at::kFloat && rows.size(2) == kv.size(3) / 16 &&
                        rows.size(1) == row_heads && rows.stride(2) == 1 && rows.stride(1) == rows.size(2),
                    "rows must be float32 [tokens, heads, head_dim] with contiguous heads and kv_layer's head_dim");
  TORCH_CHECK_VALUE(block_table.dim() == 2 && block_table.scalar_type() == at::kInt && block_table.stride(1) == 1,
                    "block_table must be int32 [sequences, blocks]");
  TORCH_CHECK_VALUE(query_start.scalar_type() == at::kInt && query_start.is_contiguous() &&
                        query_start.numel() == block_table.size(0) + 1,
                    "query_start must be int32 [sequences + 1]");
  TORCH_CHECK_VALUE(context_len.scalar_type() == at::kInt && context_len.is_contiguous() &&
                        context_len.numel() == block_table.size(0),
                    "context_len must be int32 [sequences]");
  const int32_t* start = query_start.data_ptr<int32_t>();
  const int32_t* context = context_len.data_ptr<int32_t>();
  const int32_t* table = block_table.data_ptr<int32_t>();
  TORCH_CHECK_VALUE(start[0] == 0 && start[block_table.size(0)] == rows.size(0),
                    "query_start must run from 0 to the number of tokens");
  for (int64_t s = 0; s < block_table.size(0); ++s) {
    TORCH_CHECK_VALUE(start[s] <= start[s + 1] && context[s] >= start[s + 1] - start[s],
                      "sequence ", s, ": query_start must ascend and context_len include the query tokens");
    TORCH_CHECK_VALUE((context[s] + 15) / 16 <= block_table.size(1), "sequence ", s, ": block_table is too short");
    for (int64_t b = 0; b < (context[s] + 15) / 16; ++b) {
      const int32_t block = table[s * block_table.stride(0) + b];
      TORCH_CHECK_INDEX(block >= 0 && block < kv.size(0), "sequence ", s, ": block ", block, " is outside the pool");
    }
  }
  return {kv.size(2), kv.size(3) / 16, kv.stride(0)};
}

void write_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor& kv, const at::Tensor& block_table,
              const at::Tensor& query_start, const at::Tensor& context_len) {
  const Pool pool = check(k, kv.size(2), kv, block_table, query_start, context_len);
  check(v, kv.size(2), kv, block_table, query_start, context_len);
  const auto run = [&](auto* data) {
    sextant::write_kv(k.data_ptr<float>(), k.stride(0), v.data_ptr<float>(), v.stride(0), data, pool.block_stride,
                      block_table.data_ptr<int32_t>(), block_table.stride(0), query_start.data_ptr<int32_t>(),
                      context_len.data_ptr<int32_t>(), block_table.size(0), pool.kv_heads, pool.head_dim);
  };
  if (kv.scalar_type() == at::kFloat) return run(kv.data_ptr<float>());
  TORCH_CHECK_TYPE(kv.scalar_type() == at::kBFloat16, "kv_layer must be float32 or bfloat16 on the CPU");
  run(kv.data_ptr<at::BFloat16>());
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& block_table,
                           const at::Tensor& query_start, const at::Tensor& context_len, double scale) {
  const Pool pool = check(q, q.size(1), kv, block_table, query_start, context_len);
  TORCH_CHECK_VALUE(q.size(1) % pool.kv_heads == 0, "the number of query heads must be a multiple of kv_heads");
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2)}, q.options());
  const auto run = [&](const auto* data) {
    sextant::paged_attention(q.data_ptr<float>(), q.stride(0), out.data_ptr<float>(), out.stride(0), data,
                             pool.block_stride, block_table.data_ptr<int32_t>(), block_table.stride(0),
                             query_start.data_ptr<int32_t>(), context_len.data_ptr<int32_t>(), block_table.size(0),
                             q.size(1), pool.kv_heads, pool.head_dim, static_cast<float>(scale));
  };
  if (kv.scalar_type() == at::kFloat) {
    run(kv.data_ptr<float>());
  } else {
    TORCH_CHECK_TYPE(kv.scalar_type() == at::kBFloat16, "kv_layer must be float32 or bfloat16 on the CPU");
    run(kv.data_ptr<at::BFloat16>());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) kv_layer, Tensor block_table, Tensor query_start, Tensor context_len) -> ()");
  m.def("paged_attention(Tensor q, Tensor kv_layer, Tensor block_table, Tensor query_start, Tensor context_len, float scale) -> Tensor");
  m.def("paged_attention_set_isa(int isa) -> int", &sextant::vec::set_isa);  // for tests: 0 portable, 1 AVX2, 2 AVX-512, negative asks; returns it
}

TORCH_LIBRARY_IMPL(sextant, CPU, m) {
  m.impl("write_kv", &write_kv);
  m.impl("paged_attention", &paged_attention);
}
