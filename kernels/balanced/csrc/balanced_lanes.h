// From torch tensors to a BalancedLanes, with every size checked: a kernel never reads beyond what it was given.
#pragma once

#include <ATen/core/Tensor.h>

#include "balanced/csrc/balanced.h"

namespace sextant {

inline BalancedLanes lanes_of(const at::Tensor& values, const at::Tensor& index, const at::Tensor& scales, int64_t rows,
                              int64_t columns, int64_t tile, int64_t kind) {
  BalancedLanes w;
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 2 && tile >= 1 && tile <= 256 && rows >= 1 && columns >= 1, "unknown kind of index");
  TORCH_CHECK_VALUE(values.device().is_cpu() && index.device().is_cpu() && scales.device().is_cpu(),
                    "values, index and scales must lie on the CPU");
  TORCH_CHECK_VALUE(values.dim() == 4 && values.size(3) == kLanes && values.is_contiguous() && index.is_contiguous(),
                    "values must be contiguous [groups, tiles, entries, 16]");
  switch (values.scalar_type()) {
    case at::kFloat:
      w.value = BalancedValue::kF32;
      break;
    case at::kBFloat16:
      w.value = BalancedValue::kBf16;
      break;
    case at::kHalf:
      w.value = BalancedValue::kF16;
      break;
    case at::kChar:
      w.value = BalancedValue::kInt8;
      break;
    default:
      TORCH_CHECK_VALUE(false, "values must be float32, bfloat16, float16 or int8, not ", values.scalar_type());
  }
  w.kind = static_cast<BalancedIndex>(kind);
  w.rows = rows;
  w.columns = columns;
  w.tile = tile;
  w.tiles = values.size(1);
  w.per_tile = values.size(2);
  w.values = static_cast<const char*>(values.const_data_ptr());
  w.index = static_cast<const char*>(index.const_data_ptr());
  w.scales = nullptr;
  TORCH_CHECK_VALUE(values.size(0) == w.groups() && w.tiles * tile >= columns && (w.tiles - 1) * tile < columns,
                    "values ", values.sizes(), " do not fit a weight of ", rows, " x ", columns);
  TORCH_CHECK_VALUE(w.per_tile <= tile && tile <= (w.kind == BalancedIndex::kBitmap ? 32 : w.kind == BalancedIndex::kNibble ? 16 : 256),
                    "a tile of ", tile, " columns does not fit its index");
  TORCH_CHECK_VALUE(static_cast<int64_t>(index.nbytes()) == w.groups() * w.index_stride(), "the index has ", index.nbytes(),
                    " bytes instead of ", w.groups() * w.index_stride());
  if (w.value == BalancedValue::kInt8) {
    TORCH_CHECK_VALUE(scales.scalar_type() == at::kFloat && scales.is_contiguous() && scales.numel() == rows,
                      "int8 values need a float32 scale for each row");
    w.scales = scales.const_data_ptr<float>();
  }
  return w;
}

}  // namespace sextant
