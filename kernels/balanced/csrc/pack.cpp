// Packing and unpacking of balanced weights: which entries are kept, their values, and the dense weight again.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "balanced/csrc/balanced_lanes.h"
#include "balanced/csrc/balanced_portable.h"
#include "linear/csrc/weight_memory.h"

namespace sextant {
namespace {

constexpr int64_t kMaxBlock = 256;

// A float as an integer of the same order: NaN above infinity, -0 equal to +0.
inline int32_t order_of(float score) {
  if (score != score) return INT32_MAX;
  const float no_negative_zero = score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &no_negative_zero, 4);
  return bits >= 0 ? bits : bits ^ INT32_MAX;
}

// The k greatest of `count` keys, the lower position of equal ones, ascending. The threshold is found bit by bit: as many passes
// for every block size, and each of them vectorises.
inline void select_block(const int32_t* key, int count, int k, uint8_t* kept) {
  if (k >= count) {
    for (int i = 0; i < k; ++i) kept[i] = static_cast<uint8_t>(i);
    return;
  }
  uint32_t threshold = 0;  // of keys shifted to unsigned order: the greatest value that at least k keys reach
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = threshold | (uint32_t{1} << bit);
    const int32_t least = static_cast<int32_t>(candidate ^ 0x80000000u);
    int reached = 0;
    for (int i = 0; i < count; ++i) reached += key[i] >= least;
    if (reached >= k) threshold = candidate;
    if (reached == k) break;  // it already parts the block
  }
  const int32_t least = static_cast<int32_t>(threshold ^ 0x80000000u);
  int above = 0;
  for (int i = 0; i < count; ++i) above += key[i] > least;
  int equal = k - above, found = 0;
  for (int i = 0; i < count && found < k; ++i) {
    const bool tie = key[i] == least;
    if (key[i] > least || (tie && equal > 0)) {
      kept[found++] = static_cast<uint8_t>(i);
      equal -= tie;
    }
  }
}

at::Tensor balanced_select(const at::Tensor& scores, int64_t k, int64_t block) {
  TORCH_CHECK_VALUE(scores.dim() == 2 && scores.scalar_type() == at::kFloat && scores.is_contiguous(),
                    "scores must be contiguous float32 [groups, columns]");
  TORCH_CHECK_VALUE(block >= 1 && block <= kMaxBlock && k >= 1 && k <= block, "k must be 1 to block, block 1 to ", kMaxBlock);
  const int64_t groups = scores.size(0), columns = scores.size(1), blocks = (columns + block - 1) / block;
  at::Tensor positions = at::empty({groups, blocks, k}, scores.options().dtype(at::kByte));
  const float* from = scores.const_data_ptr<float>();
  auto* to = positions.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, groups, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns)), [&](int64_t first, int64_t last) {
    int32_t key[kMaxBlock];
    for (int64_t g = first; g < last; ++g) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int count = static_cast<int>(std::min(block, columns - b * block));
        const float* score = from + g * columns + b * block;
        for (int i = 0; i < count; ++i) key[i] = order_of(score[i]);
        select_block(key, count, static_cast<int>(k), to + (g * blocks + b) * k);
      }
    }
  });
  return positions;
}

template <typename Word>
void gather(const Word* dense, const uint8_t* positions, Word* out, int64_t rows, int64_t columns, int64_t blocks, int64_t k,
            int64_t block) {
  at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / columns), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t j = 0; j < k; ++j) {
          const int64_t at = (r * blocks + b) * k + j, column = b * block + positions[at];
          out[at] = column < columns ? dense[r * columns + column] : Word{};
        }
      }
    }
  });
}

at::Tensor balanced_gather(const at::Tensor& dense, const at::Tensor& positions, int64_t block) {
  TORCH_CHECK_VALUE(dense.dim() == 2 && dense.is_contiguous(), "the weight must be contiguous [rows, columns]");
  const int64_t rows = dense.size(0), columns = dense.size(1), blocks = (columns + block - 1) / block;
  TORCH_CHECK_VALUE(positions.dim() == 3 && positions.scalar_type() == at::kByte && positions.is_contiguous() &&
                        positions.size(0) == rows && positions.size(1) == blocks,
                    "positions must be contiguous uint8 [rows, blocks, k]");
  const int64_t k = positions.size(2);
  at::Tensor out = at::empty({rows, blocks, k, 1}, dense.options());
  const uint8_t* where = positions.const_data_ptr<uint8_t>();
  const auto run = [&](auto word) {
    using Word = decltype(word);
    gather(static_cast<const Word*>(dense.const_data_ptr()), where, static_cast<Word*>(out.mutable_data_ptr()), rows, columns,
           blocks, k, block);
  };
  switch (dense.element_size()) {
    case 8:
      run(uint64_t{});
      break;
    case 4:
      run(uint32_t{});
      break;
    case 2:
      run(uint16_t{});
      break;
    default:
      run(uint8_t{});
  }
  return out;
}

// The lanes layout of rows [groups, blocks, k, vector] and their positions, into the memory given: values [n, tiles, j, 16] and
// the index of `kind`. What fills tiles and groups up is a zero at a column beyond the last one (see lanes.py).
void balanced_to_lanes(const at::Tensor& rows_values, const at::Tensor& positions, int64_t rows, int64_t columns, int64_t block,
                       at::Tensor values, at::Tensor index, int64_t tile, int64_t kind) {
  const at::Tensor ones = at::empty({values.scalar_type() == at::kChar ? rows : 0}, values.options().dtype(at::kFloat));
  const BalancedLanes w = lanes_of(values, index, ones, rows, columns, tile, kind);
  TORCH_CHECK_VALUE(block >= 1 && tile % block == 0 && rows_values.dim() == 4 && rows_values.is_contiguous() &&
                        rows_values.scalar_type() == values.scalar_type(), "values must be contiguous [groups, blocks, k, vector]");
  const int64_t blocks = (columns + block - 1) / block, merge = tile / block, k = w.per_tile / merge, vector = rows_values.size(3);
  TORCH_CHECK_VALUE(k * merge == w.per_tile && positions.is_contiguous() && positions.scalar_type() == at::kByte &&
                        positions.sizes() == rows_values.sizes().slice(0, 3) && rows_values.size(1) == blocks &&
                        rows_values.size(2) == k && vector >= 1 && rows_values.size(0) == (rows + vector - 1) / vector,
                    "positions must be contiguous uint8 [groups, blocks, k]");
  const int64_t bytes = w.value_bytes();
  const auto* where = positions.const_data_ptr<uint8_t>();
  const auto* from = static_cast<const char*>(rows_values.const_data_ptr());
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  auto* to_index = static_cast<char*>(index.mutable_data_ptr());
  const auto run = [&](auto word) {
    using Word = decltype(word);
    at::parallel_for(0, w.groups(), 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        char* out_index = to_index + g * w.index_stride();
        auto* out = reinterpret_cast<Word*>(to + g * w.values_stride());
        std::memset(out_index, 0, w.index_stride());
        for (int64_t b = 0, entry = 0; b < w.tiles * merge; ++b) {
          for (int64_t j = 0; j < k; ++j, ++entry) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              const int64_t row = g * kLanes + lane, source = std::min(row, rows - 1);
              const int64_t at = (source / vector * blocks + b) * k + j;
              const bool real = b < blocks;
              const unsigned position = static_cast<unsigned>(b % merge * block + (real ? where[at] : j));
              out[entry * kLanes + lane] =
                  real && row < rows ? reinterpret_cast<const Word*>(from)[at * vector + source % vector] : Word{};
              if (w.kind == BalancedIndex::kBitmap)
                reinterpret_cast<uint32_t*>(out_index)[b / merge * kLanes + lane] |= uint32_t{1} << (position & 31);
              else if (w.kind == BalancedIndex::kNibble)
                out_index[entry / 2 * kLanes + lane] |= static_cast<char>(position << (entry % 2 * 4));
              else
                out_index[entry * kLanes + lane] = static_cast<char>(position);
            }
          }
        }
      }
    });
  };
  if (bytes == 4)
    run(uint32_t{});
  else if (bytes == 2)
    run(uint16_t{});
  else
    run(uint8_t{});
}

at::Tensor balanced_unpack_lanes(const at::Tensor& values, const at::Tensor& index, int64_t rows, int64_t columns, int64_t tile,
                                 int64_t kind) {
  const at::Tensor ones = at::empty({values.scalar_type() == at::kChar ? rows : 0}, values.options().dtype(at::kFloat));
  const BalancedLanes w = lanes_of(values, index, ones, rows, columns, tile, kind);
  at::Tensor dense = at::zeros({rows, columns}, values.options());
  const int64_t bytes = w.value_bytes();
  auto* to = static_cast<char*>(dense.mutable_data_ptr());
  at::parallel_for(0, w.groups(), 1, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const char* from = w.values + g * w.values_stride();
      for (int64_t lane = 0; lane < std::min(kLanes, rows - g * kLanes); ++lane) {
        char* row = to + (g * kLanes + lane) * columns * bytes;
        const auto run = [&](auto word) {
          using Word = decltype(word);
          portable::for_each_entry(w, g, lane, [&](int64_t entry, int64_t column) {
            if (column < columns)
              reinterpret_cast<Word*>(row)[column] = reinterpret_cast<const Word*>(from)[entry * kLanes + lane];
          });
        };
        if (bytes == 4)
          run(uint32_t{});
        else if (bytes == 2)
          run(uint16_t{});
        else
          run(uint8_t{});
      }
    }
  });
  return dense;
}

}  // namespace
}  // namespace sextant

TORCH_LIBRARY_FRAGMENT(sextant, m) {
  m.def("balanced_select(Tensor scores, int k, int block) -> Tensor");
  m.def("balanced_gather(Tensor dense, Tensor positions, int block) -> Tensor");
  m.def("balanced_unpack_lanes(Tensor values, Tensor index, int rows, int columns, int tile, int kind) -> Tensor");
  m.def("balanced_to_lanes(Tensor rows_values, Tensor positions, int rows, int columns, int block, Tensor(a!) values, "
        "Tensor(b!) index, int tile, int kind) -> ()");
  m.def("balanced_memory(int bytes) -> Tensor", &sextant::weight_memory);
}

TORCH_LIBRARY_IMPL(sextant, CPU, m) {
  m.impl("balanced_select", &sextant::balanced_select);
  m.impl("balanced_gather", &sextant::balanced_gather);
  m.impl("balanced_to_lanes", &sextant::balanced_to_lanes);
  m.impl("balanced_unpack_lanes", &sextant::balanced_unpack_lanes);
}
