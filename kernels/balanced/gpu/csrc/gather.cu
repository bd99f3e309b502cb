// Batch 1 to 4: x in shared memory as float32, a row for each lane, 16 bytes of its values in registers at a time.
//
// The sixteen warps of a thread block go through the same 32 rows and take turns at their chunks; their sums are added in order of
// the warps. All lanes are in the same block of columns at once: with B <= 32 no two of them meet in a bank of shared memory.
// Defines besides those of weight.cuh: SAMPLES, the rows of x (1, 2 or 4; further ones are zeros).
#include "result.cuh"

constexpr int samples = SEXTANT_SAMPLES, warps = 16;

// Blocks beyond the last one that the entries which fill up a row name; x is zero there.
constexpr int spare_blocks = (chunk - 1 + k - 1) / k;

constexpr int common(int a, int b) { return b == 0 ? a : common(b, a % b); }
constexpr int blocks_a_word = block < warp ? warp / block : 1;

// What a lane has under way at once. Entries: two chunks and their index. Bitmaps: as many words of 32 columns, each with the same
// number of entries, as fill a whole number of chunks.
constexpr bool by_bitmap = SEXTANT_INDEX == 2;
constexpr int entries_a_word = by_bitmap ? k * blocks_a_word : 1;
constexpr int words = by_bitmap ? chunk / common(entries_a_word, chunk) : 1;
constexpr int chunks = by_bitmap ? words * entries_a_word / chunk : 2;
constexpr int bitmap_blocks = words * blocks_a_word;

struct Part {  // the part of a product that a thread block computes, in chunks of a row; `steps` of the whole row
  int first_block, first_step, last_step, steps, bitmap_words;
};

struct Fetched {
  Values value[chunks];
  Positions position[by_bitmap ? 1 : chunks];
  uint32_t word[words];
};

__device__ __forceinline__ void fetch(Fetched& into, const uint4* values, const void* index, int row, const Part& part, int unit) {
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int step = part.first_step + unit * chunks + c;
    into.value[c] = Values();
    if constexpr (!by_bitmap) into.position[c] = Positions();
    if (step < part.last_step) {
      into.value[c] = values_of(values, row, step, part.steps);
      if constexpr (!by_bitmap) into.position[c] = positions_of(index, row, step, part.steps);
    }
  }
  if constexpr (by_bitmap) {
#pragma unroll
    for (int w = 0; w < words; ++w) {
      const int word = part.first_block / blocks_a_word + unit * words + w;
      into.word[w] = load_once(static_cast<const uint32_t*>(index) + chunk_of(row, word, part.bitmap_words));
    }
  }
}

__device__ __forceinline__ void add(float (&acc)[samples], float value, const float* x, int column) {
#pragma unroll
  for (int n = 0; n < samples; ++n) acc[n] += value * x[column * samples + n];
}

__device__ __forceinline__ void consume(float (&acc)[samples], Fetched& from, const float* x, const Part& part, int unit) {
  if constexpr (by_bitmap) {
#pragma unroll
    for (int e = 0; e < chunks * chunk; ++e) {
      const int w = e / entries_a_word;
      // An entry that fills up has no bit and takes column 31: behind the last block, where x is zero.
      const int bit = lowest_bit(from.word[w]) & 31;
      from.word[w] &= from.word[w] - 1;
      add(acc, to_float(from.value[e / chunk].at[e % chunk]), x, (unit * words + w) * warp + bit);
    }
  } else {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int step = part.first_step + unit * chunks + c;
      if (step >= part.last_step) break;
#pragma unroll
      for (int e = 0; e < chunk; ++e) {
        const int column = (block_of(step * chunk, e) - part.first_block) * block + from.position[c][e];
        add(acc, to_float(from.value[c].at[e]), x, column);
      }
    }
  }
}

__global__ void __launch_bounds__(warps * warp)
gather(const x_t* __restrict__ x, const uint4* __restrict__ values, const void* __restrict__ index, Result result, int columns,
       int steps, int blocks, int blocks_a_split, int width) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int first_block = blockIdx.y * blocks_a_split, last_block = min(first_block + blocks_a_split, blocks);
  const Part part{first_block, first_block * k / chunk, (last_block * k + chunk - 1) / chunk, steps,
                  (blocks + bitmap_blocks - 1) / bitmap_blocks * words};
  const int lane = threadIdx.x % warp, number = threadIdx.x / warp;
  // Lanes behind the last row repeat it: whoever shares a choice has no index of its own there.
  const int row = min(static_cast<int>(blockIdx.x * warp) + lane, result.rows - 1);
  const int units = (part.last_step - part.first_step + chunks - 1) / chunks;
  Fetched now;
  if (number < units) fetch(now, values, index, row, part, number);  // under way while x is brought in
  for (int n = 0; n < samples; ++n) {
    for (int c = threadIdx.x; c < width; c += warps * warp) {
      const int column = first_block * block + c;
      const bool there = n < result.batch && column < columns;
      shared[c * samples + n] = there ? to_float(x[static_cast<int64_t>(n) * columns + column]) : 0.0f;
    }
  }
  __syncthreads();
  float acc[samples] = {};
  for (int unit = number; unit < units; unit += warps) {
    Fetched next;
    if (unit + warps < units) fetch(next, values, index, row, part, unit + warps);
    consume(acc, now, shared, part, unit);
    now = next;
  }
  __syncthreads();
  for (int n = 0; n < samples; ++n) shared[(number * samples + n) * warp + lane] = acc[n];
  __syncthreads();
  for (int i = threadIdx.x; i < samples * warp; i += warps * warp) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += shared[w * samples * warp + i];
    result.take(sum, i / warp, blockIdx.x * warp + i % warp, blockIdx.y);
  }
}

// What the caller needs to know for its split and its bitmap: parts must be a multiple of so many blocks, which fill whole chunks.
extern "C" int sextant_unit_blocks() { return by_bitmap ? bitmap_blocks : chunk / common(k, chunk); }

extern "C" int sextant_launch(const void* x, const void* values, const void* index, const void* scales, const void* bias, void* out,
                              void* partial, int rows, int columns, int batch, int steps, int blocks, int blocks_a_split,
                              int splits, int device, void* stream) {
  if (const int error = choose_device(device)) return error;
  const int unit = sextant_unit_blocks(), width = ((blocks_a_split + unit - 1) / unit * unit + spare_blocks) * block;
  const int floats = max(width * samples, warps * samples * warp);
  const Result result{static_cast<const float*>(scales), static_cast<const float*>(bias), static_cast<x_t*>(out),
                      static_cast<float*>(partial), rows, batch, splits};
  const int error = launch(gather, dim3((rows + warp - 1) / warp, splits), warps * warp, floats * 4, stream,
                           static_cast<const x_t*>(x), static_cast<const uint4*>(values), index, result, columns, steps, blocks,
                           blocks_a_split, width);
  return error != 0 ? error : launch_reduce(result, stream);
}
