// What the kernels need of the device: numbers, warp-wide matrix instructions, the launch. The tests put a header in its place that
// runs a grid on the CPU (SEXTANT_EMULATED), thread by thread, so that the kernels' own source is checked without a GPU.
#pragma once

#ifdef SEXTANT_EMULATED
#include "emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

using half_t = __half;
using bfloat_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half_t value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat_t value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(int8_t value) { return static_cast<float>(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ half_t from_float<half_t>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ bfloat_t from_float<bfloat_t>(float value) { return __float2bfloat16_rn(value); }

// Read once and never again: past L1, first to leave L2.
__device__ __forceinline__ uint4 load_once(const uint4* from) { return __ldcs(from); }
__device__ __forceinline__ uint2 load_once(const uint2* from) { return __ldcs(from); }
__device__ __forceinline__ uint32_t load_once(const uint32_t* from) { return __ldcs(from); }
__device__ __forceinline__ uint16_t load_once(const uint16_t* from) { return __ldcs(from); }

__device__ __forceinline__ int lowest_bit(uint32_t word) { return __ffs(word) - 1; }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and receives, of each, elements
// 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&into)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
               : "r"(address) : "memory");
}

// c [16 x 8] += a [16 x 16] b [16 x 8], float32 sums.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<half_t>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<bfloat_t>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

// This library has a CUDA runtime of its own, which does not follow torch's choice of a device.
inline int choose_device(int device) { return static_cast<int>(cudaSetDevice(device)); }

// Runs the kernel on a stream; a CUDA error code, 0 for none.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}
#endif
