// Panels with AMX (tdpbf16ps: 16 x 16 outputs, 32 steps of k in one instruction), for bf16. The code is written over a small
// set of tile operations that exists twice: the CPU's, and one in plain C++ with which the tests run every line of it on any
// machine. Before the CPU's tiles are used for the first time, their result is compared with the plain ones.
// Their bits differ from those of vdpbf16ps, so linear_numerics() names the path and unlike hosts refuse a migration.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <c10/util/Exception.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __has_include(<amxbf16intrin.h>)
#define SEXTANT_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sextant::linear_detail {
namespace {

constexpr int kAmxRows = 32;   // two tiles of activations
constexpr int kTileBytes = 64;  // a tile's row: 32 bf16 or 16 fp32

// Tiles 0 ... 3 are sums (rows 0-15 and 16-31, columns 0-15 and 16-31), 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int height) {
    const int upper = height < 16 ? height : 16, lower = height - upper;
    const int heights[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<uint8_t>(heights[i]);
      row_bytes[i] = heights[i] > 0 ? kTileBytes : 0;
    }
  }
};

// The tile operations in plain C++, after the instruction's description in Intel's manual.
struct SoftTiles {
  struct State {
    TileConfig config{1};
    alignas(64) char data[8][16][kTileBytes];
  };
  static State& state() {
    static thread_local State state;
    return state;
  }
  static void configure(const TileConfig& config) {
    state().config = config;
    std::memset(state().data, 0, sizeof(state().data));
  }
  static void release() {}
  template <int T>
  static void load(const void* from, int64_t stride) {
    for (int r = 0; r < state().config.rows[T]; ++r)
      std::memcpy(state().data[T][r], static_cast<const char*>(from) + r * stride, kTileBytes);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < state().config.rows[T]; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, state().data[T][r], kTileBytes);
  }
  template <int C, int A, int B>
  static void multiply() {
    State& s = state();
    for (int r = 0; r < s.config.rows[C]; ++r)
      for (int pair = 0; pair < s.config.rows[B]; ++pair)
        for (int n = 0; n < 16; ++n)
          for (int odd = 0; odd < 2; ++odd) {
            float* sum = reinterpret_cast<float*>(s.data[C][r]) + n;
            *sum = std::fma(bf16(s.data[A][r] + 4 * pair + 2 * odd), bf16(s.data[B][pair] + 4 * n + 2 * odd), *sum);
          }
  }
  static float bf16(const char* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

#ifdef SEXTANT_AMX
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
struct AmxTiles {
  static void configure(const TileConfig& config) { _tile_loadconfig(&config); }
  static void release() { _tile_release(); }
  // The tile is part of the instruction, so it must be a literal.
  template <int T>
  static void load(const void* from, int64_t stride) {
    if constexpr (T == 4) _tile_loadd(4, from, stride);
    if constexpr (T == 5) _tile_loadd(5, from, stride);
    if constexpr (T == 6) _tile_loadd(6, from, stride);
    if constexpr (T == 7) _tile_loadd(7, from, stride);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    if constexpr (T == 0) _tile_stored(0, to, stride);
    if constexpr (T == 1) _tile_stored(1, to, stride);
    if constexpr (T == 2) _tile_stored(2, to, stride);
    if constexpr (T == 3) _tile_stored(3, to, stride);
  }
  template <int C, int A, int B>
  static void multiply() {
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
  }
};
#endif

// Under the same target, so that the tile operations are inlined: no tile may live across a call.
template <typename Tiles, int R>
__attribute__((always_inline)) inline void step_amx(const char* x, int64_t x_stride, const char* low, const char* high, int64_t w_stride) {
  Tiles::template load<4>(x, x_stride);
  Tiles::template load<6>(low, w_stride);
  Tiles::template load<7>(high, w_stride);
  Tiles::template multiply<0, 4, 6>();
  Tiles::template multiply<1, 4, 7>();
  if constexpr (R > 16) {
    Tiles::template load<5>(x + 16 * x_stride, x_stride);
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
  }
}

// One panel [k/2][32][2] for R rows of bf16, `xs` elements apart; rows are zero from k up to a multiple of 32.
template <typename Tiles, int R>
void panel_amx(const void* x_, int64_t xs, const void* w_, int64_t k, void* out_) {
  const char* x = static_cast<const char*>(x_);
  const char* w = static_cast<const char*>(w_);
  char* out = static_cast<char*>(out_);
  constexpr int64_t kRow = 2 * kTileBytes;  // a panel's row of 32 pairs, and a row of 32 sums
  const int64_t x_stride = xs * 2, pairs = k / 2, whole = pairs / 16;
  Tiles::configure(TileConfig(R));  // for every panel: another library's tiles may stand there. The sums begin at zero
  for (int64_t j = 0; j < whole; ++j) {
    const char* from = w + j * 16 * kRow;
    step_amx<Tiles, R>(x + j * kTileBytes, x_stride, from, from + kTileBytes, kRow);
  }
  if (const int64_t rest = pairs - whole * 16; rest > 0) {
    alignas(64) char tail[16 * kRow];
    std::memcpy(tail, w + whole * 16 * kRow, static_cast<size_t>(rest * kRow));
    std::memset(tail + rest * kRow, 0, static_cast<size_t>((16 - rest) * kRow));
    __asm__ volatile("" ::"r"(tail) : "memory");  // GCC's tile loads do not say that they read memory
    step_amx<Tiles, R>(x + whole * kTileBytes, x_stride, tail, tail + kTileBytes, kRow);
  }
  Tiles::template store<0>(out, kRow);
  Tiles::template store<1>(out + kTileBytes, kRow);
  if constexpr (R > 16) {
    Tiles::template store<2>(out + 16 * kRow, kRow);
    Tiles::template store<3>(out + 16 * kRow + kTileBytes, kRow);
  }
}

using AmxFn = void (*)(const void*, int64_t, const void*, int64_t, void*);
template <typename Tiles, int... R>
constexpr auto amx_table(std::integer_sequence<int, R...>) {
  struct Table {
    AmxFn panels[sizeof...(R) + 1];
  };
  return Table{{nullptr, panel_amx<Tiles, R + 1>...}};
}
template <typename Tiles>
struct TableAmx {
  static constexpr auto table = amx_table<Tiles>(std::make_integer_sequence<int, kAmxRows>());
};
#ifdef SEXTANT_AMX
#pragma GCC pop_options
#endif

#ifdef SEXTANT_AMX
// Whether the CPU has tiles with bf16 and the kernel lets this process use them.
inline bool amx_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The CPU's tiles against the plain ones, with rows in both tiles and a tail of k.
inline bool amx_is_right() {
  constexpr int64_t kInputs = 70, kStride = 96;
  std::vector<uint16_t> x(kAmxRows * kStride, 0), w(kInputs * 32);
  uint32_t random = 1;
  const auto next = [&random] {  // bf16 of either sign between 1/2 and 2
    random = random * 1664525u + 1013904223u;
    return static_cast<uint16_t>((random >> 31 << 15) | 0x3f00u | (random >> 16 & 0xffu));
  };
  for (int64_t r = 0; r < kAmxRows; ++r)
    for (int64_t j = 0; j < kInputs; ++j) x[r * kStride + j] = next();
  for (uint16_t& value : w) value = next();
  for (const int rows : {1, 16, 17, 32}) {
    std::vector<float> got(kAmxRows * 32, 0.0f), expected(kAmxRows * 32, 0.0f);
    TableAmx<AmxTiles>::table.panels[rows](x.data(), kStride, w.data(), kInputs, got.data());
    AmxTiles::release();
    TableAmx<SoftTiles>::table.panels[rows](x.data(), kStride, w.data(), kInputs, expected.data());
    for (size_t i = 0; i < got.size(); ++i)
      if (!(std::fabs(got[i] - expected[i]) <= 1e-3f)) return false;
  }
  return true;
}

inline bool amx_usable() {
  static const bool usable = [] {
    if (!amx_allowed()) return false;
    if (amx_is_right()) return true;
    TORCH_WARN("This CPU's AMX tiles gave a wrong product in the self-check; bf16 runs with AVX-512 instead.");
    return false;
  }();
  return usable;
}
#else
inline bool amx_usable() { return false; }
#endif

}  // namespace
}  // namespace sextant::linear_detail
