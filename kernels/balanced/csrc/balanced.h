// The balanced weight in the lanes layout, as its kernels see it. kernels/balanced/lanes.py says what the layout is.
#pragma once

#include <cstdint>

namespace sextant {

enum class BalancedValue : int { kF32 = 0, kBf16 = 1, kF16 = 2, kInt8 = 3 };
enum class BalancedIndex : int { kBitmap = 0, kNibble = 1, kByte = 2 };

constexpr int64_t kLanes = 16;
// Floats that a kernel may read from the begin of a tile: it loads whole registers of x, sixteen of them at most.
constexpr int64_t kTilePad = 256;
// Bytes that values are prefetched ahead of one row's product: eight streams at this distance read 8 % faster than without.
constexpr int64_t kAhead = 1024;

struct BalancedLanes {
  BalancedValue value;
  BalancedIndex kind;
  int64_t rows, columns;
  int64_t tile;      // columns of a tile
  int64_t tiles;     // tiles of a row
  int64_t per_tile;  // entries of a row in a tile
  const char* values;
  const char* index;
  const float* scales;  // int8 only

  int64_t groups() const { return (rows + kLanes - 1) / kLanes; }
  int64_t value_bytes() const { return value == BalancedValue::kF32 ? 4 : value == BalancedValue::kInt8 ? 1 : 2; }
  int64_t entries() const { return tiles * per_tile; }
  int64_t values_stride() const { return entries() * kLanes * value_bytes(); }
  int64_t index_stride() const {  // bytes of a group
    switch (kind) {
      case BalancedIndex::kBitmap:
        return tiles * kLanes * 4;
      case BalancedIndex::kNibble:
        return (entries() + 1) / 2 * kLanes;
      default:
        return entries() * kLanes;
    }
  }
  int64_t x_stride() const { return (tiles * tile + kTilePad + 15) / 16 * 16; }
};

}  // namespace sextant
