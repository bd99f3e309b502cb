// Where sums go: to the result, or, where a product is split along the columns, to their part of `partial` [splits, batch, rows],
// which `reduce` adds in order afterwards. No atomics: the same bits every time.
#pragma once

#include "weight.cuh"

struct Result {
  const float* scales;  // [rows], for int8 values
  const float* bias;    // [rows] or null
  x_t* out;             // [batch, rows]
  float* partial;
  int rows, batch, splits;

  __device__ void finish(float sum, int sample, int row) const {
    if (SEXTANT_VALUE == 3) sum *= scales[row];
    if (bias != nullptr) sum += bias[row];
    out[static_cast<int64_t>(sample) * rows + row] = from_float<x_t>(sum);
  }
  __device__ void take(float sum, int sample, int row, int split) const {
    if (sample >= batch || row >= rows) return;
    if (splits == 1) finish(sum, sample, row);
    else partial[(static_cast<int64_t>(split) * batch + sample) * rows + row] = sum;
  }
};

constexpr int reduce_threads = 128;

__global__ void __launch_bounds__(reduce_threads) reduce(Result result) {
  const int row = blockIdx.x * reduce_threads + threadIdx.x, sample = blockIdx.y;
  if (row >= result.rows) return;
  float sum = 0.0f;
  for (int split = 0; split < result.splits; ++split)
    sum += result.partial[(static_cast<int64_t>(split) * result.batch + sample) * result.rows + row];
  result.finish(sum, sample, row);
}

inline int launch_reduce(const Result& result, void* stream) {
  if (result.splits == 1) return 0;
  const dim3 grid((result.rows + reduce_threads - 1) / reduce_threads, result.batch);
  return launch(reduce, grid, reduce_threads, 0, stream, result);
}
