// y = x W^T (+ bias) (+ y) with W packed in panels of 32 output columns, over plain pointers: used by linear.cpp (torch ops) and by
// the whole-model decoder. Threads divide panels only, and each output is one chain over k: a row's bits depend on that row and
// the weights alone. Activations are prepared once per row (bf16: rounded; int8: symmetric, one scale per row) for all panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include <ATen/Parallel.h>

#include "linear/csrc/linear_amx.h"
#include "linear/csrc/linear_x86.h"
#include "simd/csrc/cpu_isa.h"

namespace sextant {
namespace linear_detail {
namespace {

#define SEXTANT_VEC_LOOPS "linear/csrc/linear_isa.h"
#include "simd/csrc/vector_dispatch.h"
#undef SEXTANT_VEC_LOOPS

}  // namespace
}  // namespace linear_detail

enum class LinearKind : int { kF32 = 0, kBf16 = 1, kInt8 = 2 };
constexpr int64_t kPanel = 32;

struct PackedLinear {
  LinearKind kind = LinearKind::kF32;
  int64_t n = 0;  // output columns; the panels hold n rounded up to 32
  int64_t k = 0;  // inputs, rounded up to a multiple of 4 in the panels (bf16: 2)
  const char* data = nullptr;
  const float* scales = nullptr;     // int8: one per column (padded)
  const int32_t* offsets = nullptr;  // int8: 128 * sum of the column's weights (padded)

  int64_t padded_k() const { return kind == LinearKind::kInt8 ? (k + 3) / 4 * 4 : kind == LinearKind::kBf16 ? (k + 1) / 2 * 2 : k; }
  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t panel_bytes() const {
    return padded_k() * kPanel * (kind == LinearKind::kF32 ? 4 : kind == LinearKind::kBf16 ? 2 : 1);
  }
};

namespace linear_detail {
namespace {

using PanelFn = void (*)(const void*, int64_t, const void*, int64_t, void*);

// Instruction sets, each with those below it. kSoftTiles runs the AMX path over tiles in plain C++, for tests.
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Dot = 3, kAmx = 4, kSoftTiles = 5 };

// What SEXTANT_LINEAR_ISA allows. Hosts of a mixed cluster that are held to the same one give bf16 the same bits.
inline int allowed_level() {
  const char* wanted = std::getenv("SEXTANT_LINEAR_ISA");
  if (wanted == nullptr || *wanted == 0) return kAmx;
  const std::pair<const char*, Level> names[] = {
      {"avx2", kAvx2}, {"avx512", kAvx512}, {"avx512_bf16", kAvx512Dot}, {"amx", kAmx}};
  for (const auto& [name, level] : names)
    if (std::strcmp(wanted, name) == 0) return level;
  TORCH_WARN("SEXTANT_LINEAR_ISA=", wanted, " is none of avx2, avx512, avx512_bf16, amx, and is ignored.");
  return kAmx;
}
inline int best_level() {
  static const int best = [] {
    const int allowed = allowed_level();
    if (vec::best_isa() != vec::Isa::kAvx512) return std::min(allowed, static_cast<int>(vec::best_isa()));
    if (allowed >= kAmx && amx_usable()) return static_cast<int>(kAmx);
    return std::min(allowed, static_cast<int>(kAvx512Dot));
  }();
  return best;
}
inline std::atomic<int>& level_in_use() {
  static std::atomic<int> level{best_level()};
  return level;
}
// Lowers it for tests; negative asks. Returns what is in use.
inline int64_t set_level(int64_t level) {
  if (level == kSoftTiles) {
    level_in_use() = kSoftTiles;
  } else if (level >= 0) {
    level_in_use() = static_cast<int>(std::min<int64_t>(level, best_level()));
  }
  return level_in_use();
}
inline bool use_amx() { return level_in_use() >= kAmx; }
inline bool use_bf16_instruction() {
#ifdef SEXTANT_VEC_X86
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && level_in_use() >= kAvx512Dot;
#else
  return false;
#endif
}
inline bool use_vnni() {
#ifdef SEXTANT_VEC_X86
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has && level_in_use() >= kAvx512Dot;
#else
  return false;
#endif
}
// Whether a multiply and an add round once in all kernels here (x86 without FMA: twice).
inline bool fused_multiply_add() {
#ifdef __FP_FAST_FMAF
  return true;
#else
  return level_in_use() > kPortable;
#endif
}
// Bytes of one prepared activation.
inline int64_t element_bytes(LinearKind kind) {
  if (kind == LinearKind::kF32) return 4;
  if (kind == LinearKind::kInt8) return 1;
  return use_amx() || use_bf16_instruction() ? 2 : 4;
}

struct Path {
  const PanelFn* tiles;  // tiles[r] does r rows of one panel
  int tile_rows;
};

inline Path path_of(LinearKind kind) {
  if (kind == LinearKind::kBf16 && level_in_use() == kSoftTiles) return {TableAmx<SoftTiles>::table.panels, kAmxRows};
#ifdef SEXTANT_AMX
  if (kind == LinearKind::kBf16 && use_amx()) return {TableAmx<AmxTiles>::table.panels, kAmxRows};
#endif
#ifdef SEXTANT_VEC_X86
  if (kind == LinearKind::kBf16 && use_bf16_instruction()) return {TableX86::dpbf16, 12};
  if (kind == LinearKind::kInt8 && use_vnni()) return {TableX86::vnni, 12};
#endif
  const auto choose = [kind](const auto* f32, const auto* bf16, const auto* int8, int rows) {
    return Path{kind == LinearKind::kF32 ? f32 : kind == LinearKind::kBf16 ? bf16 : int8, rows};
  };
#ifdef SEXTANT_VEC_X86
  if (vec::best_isa() == vec::Isa::kAvx512 && level_in_use() >= kAvx512)
    return choose(avx512::Table::f32, avx512::Table::bf16, avx512::Table::int8, avx512::kTileRows);
  if (vec::best_isa() >= vec::Isa::kAvx2 && level_in_use() >= kAvx2)
    return choose(avx2::Table::f32, avx2::Table::bf16, avx2::Table::int8, avx2::kTileRows);
#endif
  return choose(portable::Table::f32, portable::Table::bf16, portable::Table::int8, portable::kTileRows);
}

#ifdef SEXTANT_VEC_X86
#define SEXTANT_LINEAR_CALL(function, ...)                                                                  \
  (vec::best_isa() == vec::Isa::kAvx512 && level_in_use() >= kAvx512 ? avx512::function(__VA_ARGS__)        \
   : vec::best_isa() >= vec::Isa::kAvx2 && level_in_use() >= kAvx2   ? avx2::function(__VA_ARGS__)          \
                                                                     : portable::function(__VA_ARGS__))
#else
#define SEXTANT_LINEAR_CALL(function, ...) portable::function(__VA_ARGS__)
#endif

}  // namespace
}  // namespace linear_detail

// Names what decides the bits of a result of this kind on this CPU now: of the products, and (last word) of every other kernel.
inline std::string linear_numerics(LinearKind kind) {
  using namespace linear_detail;
  const std::string rounding = fused_multiply_add() ? "fma" : "muladd";
  if (kind == LinearKind::kInt8) return "int8-exact-" + rounding;
  if (kind == LinearKind::kF32) return "fp32-" + rounding;
  return (use_amx() ? "bf16-amx-" : use_bf16_instruction() ? "bf16-dp-" : "bf16-") + rounding;
}

// Bytes between prepared rows of `k` inputs; 0: the fp32 rows are used as they are.
inline int64_t prepared_stride(const PackedLinear& w) {
  if (w.kind == LinearKind::kF32) return 0;
  return (w.padded_k() * linear_detail::element_bytes(w.kind) + 63) / 64 * 64;
}

// One row of activations as the panels want it, up to prepared_stride; returns its scale (1 but for int8).
inline float prepare_row(const PackedLinear& w, const float* x, void* out) {
  using namespace linear_detail;
  if (w.kind == LinearKind::kInt8) {
    auto* row = static_cast<uint8_t*>(out);
    for (int64_t j = w.k; j < w.padded_k(); ++j) row[j] = 128;
    return SEXTANT_LINEAR_CALL(row_to_int8, x, w.k, row);
  }
  const int64_t element = element_bytes(w.kind);
  const int64_t end = prepared_stride(w);  // AMX reads a row in steps of 64 bytes
  std::memset(static_cast<char*>(out) + w.k * element, 0, static_cast<size_t>(end - w.k * element));
  if (element == 2) {
    SEXTANT_LINEAR_CALL(row_to_bf16, x, w.k, static_cast<uint16_t*>(out));
  } else {
    SEXTANT_LINEAR_CALL(row_to_bf16_floats, x, w.k, static_cast<float*>(out));
  }
  return 1.0f;
}

// y[rows][n] from prepared rows (fp32: from x itself), `stride` bytes apart. `ys` floats lie between rows of y.
struct LinearWork {
  const PackedLinear* w;
  const void* x;
  int64_t stride;
  const float* row_scales;
  int64_t rows;
  float* y;
  int64_t ys;
  const float* bias;
  bool accumulate;

  // Panels first ... last - 1, all rows.
  void run(int64_t first, int64_t last) const {
    using namespace linear_detail;
    const Path path = path_of(w->kind);
    const int64_t k = w->padded_k(), panel_bytes = w->panel_bytes();
    const int64_t xs = stride / element_bytes(w->kind);
    // A block of rows stays in the second-level cache while the panels pass by it.
    const int64_t fit = std::max<int64_t>(1, (int64_t{320} << 10) / std::max<int64_t>(stride, 1) / path.tile_rows);
    const int64_t block_rows = fit * path.tile_rows;
    alignas(64) float acc[kAmxRows * kPanel];
    for (int64_t begin = 0; begin < rows; begin += block_rows) {
      const int64_t end = std::min(begin + block_rows, rows);
      const int64_t tiles = (end - begin + path.tile_rows - 1) / path.tile_rows;
      for (int64_t p = first; p < last; ++p) {
        const char* panel = w->data + p * panel_bytes;
        const int columns = static_cast<int>(std::min<int64_t>(kPanel, w->n - p * kPanel));
        const float* panel_bias = bias ? bias + p * kPanel : nullptr;
        int64_t row = begin;
        for (int64_t t = 0; t < tiles; ++t) {  // tiles of equal height: 16 rows are 8 + 8, not 12 + 4
          const int height = static_cast<int>((end - row + (tiles - t) - 1) / (tiles - t));
          path.tiles[height](static_cast<const char*>(x) + row * stride, xs, panel, k, acc);
          float* to = y + row * ys + p * kPanel;
          if (w->kind == LinearKind::kInt8)
            SEXTANT_LINEAR_CALL(finish_int8, reinterpret_cast<const int32_t*>(acc), height, columns, to, ys, panel_bias,
                                accumulate, row_scales + row, w->scales + p * kPanel, w->offsets + p * kPanel);
          else
            SEXTANT_LINEAR_CALL(finish_f32, acc, height, columns, to, ys, panel_bias, accumulate);
          row += height;
        }
      }
    }
#ifdef SEXTANT_AMX
    if (w->kind == LinearKind::kBf16 && level_in_use() == kAmx) AmxTiles::release();
#endif
  }
};

}  // namespace sextant
