// The weight that a library is compiled for, and how its entries are read: the `warps` layout of kernels/balanced/warps.py.
//
// Defines: K entries in every block of B columns, V rows share their choice, VALUE and X (0 float32, 1 bfloat16, 2 float16, 3 int8),
// INDEX (0: 8-bit entries, 1: 4-bit entries, 2: one bitmap of 32 columns a row and word).
#pragma once

#include "device.cuh"

constexpr int k = SEXTANT_K, block = SEXTANT_B, vector_rows = SEXTANT_V, warp = 32;

template <int type> struct Type;
template <> struct Type<0> { using type = float; };
template <> struct Type<1> { using type = bfloat_t; };
template <> struct Type<2> { using type = half_t; };
template <> struct Type<3> { using type = int8_t; };
using value_t = Type<SEXTANT_VALUE>::type;
using x_t = Type<SEXTANT_X>::type;

constexpr int chunk = 16 / sizeof(value_t);  // entries whose values fill 16 bytes
constexpr bool nibbles = SEXTANT_INDEX == 1;
constexpr int index_bytes = nibbles ? chunk / 2 : chunk;

template <int bytes> struct Word;
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };
using index_word = Word<index_bytes>::type;

union Values {
  uint4 word;
  value_t at[chunk];
  __device__ Values() : word{0, 0, 0, 0} {}
};
union Positions {
  index_word word;
  uint8_t byte[index_bytes];
  __device__ Positions() : word{} {}
  // In-block position of entry e of the chunk.
  __device__ int operator[](int e) const { return nibbles ? byte[e / 2] >> (e % 2 * 4) & 15 : byte[e]; }
};

// The block of entry e of the chunk that begins with entry `first`: a division by a constant, and none at all where k and the
// chunk divide one another.
__device__ __forceinline__ int block_of(int first, int e) {
  if constexpr (k % chunk == 0) return first / k;
  if constexpr (chunk % k == 0) return first / k + e / k;
  return (first + e) / k;
}

// Where chunk `step` of a row begins, counted in chunks.
__device__ __forceinline__ int64_t chunk_of(int row, int step, int steps) {
  return (static_cast<int64_t>(row / warp) * steps + step) * warp + row % warp;
}

__device__ __forceinline__ Values values_of(const uint4* values, int row, int step, int steps) {
  Values found;
  found.word = load_once(values + chunk_of(row, step, steps));
  return found;
}

__device__ __forceinline__ Positions positions_of(const void* index, int row, int step, int steps) {
  Positions found;
  found.word = load_once(static_cast<const index_word*>(index) + chunk_of(row / vector_rows, step, steps));
  return found;
}
