// Batch 5 to 128: dense tiles are put together in shared memory and multiplied on the tensor cores (mma.m16n8k16).
//
// A thread block takes 64 rows, each of its four warps 16 of them: the warp clears its part of the tile, scatters the values into
// it, and multiplies it with the tile of x that all four share. The next tile's bytes are under way meanwhile. Zeros of the tile
// meet x, so that an infinity of x makes NaN, as in a dense product.
// Defines besides those of weight.cuh: SAMPLES, the rows of x (a multiple of 16). Values are int8 or of the type of x, 16 bits.
#include "result.cuh"

constexpr int samples = SEXTANT_SAMPLES, warps = 4, threads = warps * warp, rows_a_warp = 16;

constexpr int common(int a, int b) { return b == 0 ? a : common(b, a % b); }
constexpr int least_multiple(int a, int b) { return a / common(a, b) * b; }
// Blocks of a tile: a whole number of chunks and of 16 columns, about `wanted` columns.
constexpr int unit_blocks = least_multiple(chunk / common(k, chunk), 16 / common(block, 16));
constexpr int wanted = samples <= 32 ? 128 : 64;
constexpr int tile_blocks = (wanted + unit_blocks * block - 1) / (unit_blocks * block) * unit_blocks;
constexpr int width = tile_blocks * block, stride = width + 8;  // 16 bytes more: no bank conflicts in load_matrices
constexpr int chunks = tile_blocks * k / chunk;                 // of a row, in a tile
constexpr int loads = (rows_a_warp * chunks + warp - 1) / warp; // of a lane, for a tile
constexpr int x_words = samples * width / 8, x_loads = (x_words + threads - 1) / threads;

static_assert(SEXTANT_X != 0 && (SEXTANT_VALUE == SEXTANT_X || SEXTANT_VALUE == 3), "16-bit x and values, or int8 values");
static_assert(samples % 16 == 0 && SEXTANT_INDEX != 2);

union Eight {
  uint4 word;
  x_t at[8];
  __device__ Eight() : word{0, 0, 0, 0} {}
};

template <typename T>
__device__ __forceinline__ x_t converted(T value) {
  if constexpr (sizeof(T) == 1) return from_float<x_t>(to_float(value));
  else return value;
}

struct Tile {  // what a thread has under way
  Values value[loads];
  Positions position[loads];
  Eight x[x_loads];
};

__device__ __forceinline__ void read(Tile& tile, const x_t* x, const uint4* values, const void* index, int first_row, int rows,
                                     int batch, int columns, int steps, int number, bool aligned) {
  const int lane = threadIdx.x % warp;
#pragma unroll
  for (int i = 0; i < loads; ++i) {
    const int item = i * warp + lane, step = number * chunks + item / rows_a_warp;
    const int row = min(first_row + item % rows_a_warp, rows - 1);
    tile.value[i] = Values();
    tile.position[i] = Positions();
    if (item < rows_a_warp * chunks && step < steps) {
      tile.value[i] = values_of(values, row, step, steps);
      tile.position[i] = positions_of(index, row, step, steps);
    }
  }
#pragma unroll
  for (int i = 0; i < x_loads; ++i) {
    const int item = i * threads + threadIdx.x, sample = blockIdx.z * samples + item / (width / 8);
    const int column = number * width + item % (width / 8) * 8;
    tile.x[i] = Eight();
    if (item >= x_words || sample >= batch) continue;
    const x_t* from = x + static_cast<int64_t>(sample) * columns + column;
    if (aligned) {
      if (column < columns) tile.x[i].word = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int c = 0; c < 8; ++c)
        if (column + c < columns) tile.x[i].at[c] = from[c];
    }
  }
}

__global__ void __launch_bounds__(threads)
decompress(const x_t* __restrict__ x, const uint4* __restrict__ values, const void* __restrict__ index, Result result, int columns,
           int steps, int tiles, int tiles_a_split, bool aligned) {
  SHARED_MEMORY(memory);
  const int lane = threadIdx.x % warp, number = threadIdx.x / warp;
  const int first_row = (blockIdx.x * warps + number) * rows_a_warp;
  x_t* weight = reinterpret_cast<x_t*>(memory) + number * rows_a_warp * stride;
  x_t* x_tiles = reinterpret_cast<x_t*>(memory) + warps * rows_a_warp * stride;
  float acc[samples / 8][4] = {};
  Tile tile;
  const int first = blockIdx.y * tiles_a_split, last = min(first + tiles_a_split, tiles);
  if (first < last) read(tile, x, values, index, first_row, result.rows, result.batch, columns, steps, first, aligned);
  for (int t = first; t < last; ++t) {
    x_t* x_tile = x_tiles + (t - first) % 2 * samples * stride;
#pragma unroll
    for (int i = 0; i < x_loads; ++i) {
      const int item = i * threads + threadIdx.x;
      if (item < x_words)
        *reinterpret_cast<uint4*>(x_tile + item / (width / 8) * stride + item % (width / 8) * 8) = tile.x[i].word;
    }
    for (int i = lane; i < rows_a_warp * stride / 8; i += warp) reinterpret_cast<uint4*>(weight)[i] = Eight().word;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      const int item = i * warp + lane, step = t * chunks + item / rows_a_warp;
      if (item < rows_a_warp * chunks && step < steps) {
        x_t* row = weight + item % rows_a_warp * stride;
#pragma unroll
        for (int e = 0; e < chunk; ++e) {
          const int at = (block_of(step * chunk, e) - t * tile_blocks) * block + tile.position[i][e];
          row[at] = converted(tile.value[i].at[e]);
        }
      }
    }
    __syncthreads();  // the other tile of x was last read before this
    if (t + 1 < last) read(tile, x, values, index, first_row, result.rows, result.batch, columns, steps, t + 1, aligned);
#pragma unroll
    for (int c = 0; c < width; c += 16) {
      uint32_t a[4];
      load_matrices(a, weight + lane % 16 * stride + c + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < samples; n += 16) {
        uint32_t b[4];
        load_matrices(b, x_tile + (n + lane % 8 + lane / 16 * 8) * stride + c + lane / 8 % 2 * 8);
        multiply_add<x_t>(acc[n / 8], a, b[0], b[1]);
        multiply_add<x_t>(acc[n / 8 + 1], a, b[2], b[3]);
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int n = 0; n < samples / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      result.take(acc[n][i], blockIdx.z * samples + n * 8 + lane % 4 * 2 + i % 2, first_row + lane / 4 + i / 2 * 8, blockIdx.y);
}

extern "C" int sextant_unit_blocks() { return tile_blocks; }

extern "C" int sextant_launch(const void* x, const void* values, const void* index, const void* scales, const void* bias, void* out,
                              void* partial, int rows, int columns, int batch, int steps, int blocks, int blocks_a_split,
                              int splits, int device, void* stream) {
  if (const int error = choose_device(device)) return error;
  const Result result{static_cast<const float*>(scales), static_cast<const float*>(bias), static_cast<x_t*>(out),
                      static_cast<float*>(partial), rows, batch, splits};
  const dim3 grid((rows + warps * rows_a_warp - 1) / (warps * rows_a_warp), splits, (batch + samples - 1) / samples);
  const int bytes = (warps * rows_a_warp + 2 * samples) * stride * static_cast<int>(sizeof(x_t));
  const bool aligned = columns % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int error = launch(decompress, grid, threads, bytes, stream, static_cast<const x_t*>(x), static_cast<const uint4*>(values),
                           index, result, columns, steps, (blocks + tile_blocks - 1) / tile_blocks,
                           (blocks_a_split + tile_blocks - 1) / tile_blocks, aligned);
  return error != 0 ? error : launch_reduce(result, stream);
}
