// Runs the CUDA kernels of kernels/balanced/gpu/csrc on the CPU, so that their own source is checked without a GPU: every thread of a
// thread block is a coroutine, barriers hand over to the next one. Stands in for the device part of device.cuh.
// Loads of 16 bytes must be aligned, as on a GPU; a barrier that not all threads reach, or an index outside of shared memory, aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char* name = emulated::shared.data()

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };

using half_t = _Float16;
struct bfloat_t { uint16_t bits; };

inline float to_float(float value) { return value; }
inline float to_float(half_t value) { return static_cast<float>(value); }
inline float to_float(int8_t value) { return static_cast<float>(value); }
inline float to_float(bfloat_t value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float made;
  std::memcpy(&made, &bits, 4);
  return made;
}
template <typename T> inline T from_float(float value) { return static_cast<T>(value); }
template <> inline bfloat_t from_float<bfloat_t>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  std::abort();
}

template <typename T> inline T load_once(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) fail("a misaligned load");
  return *from;
}
inline int lowest_bit(uint32_t word) { return __builtin_ffs(static_cast<int>(word)) - 1; }

namespace emulated {
enum class Wait { no, warp, block, ended };
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  Wait wait = Wait::no;
};
inline std::vector<unsigned char> shared;
inline std::vector<std::unique_ptr<Thread>> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline const void* exchange[1024];
inline uint32_t registers[1024][6];
}  // namespace emulated

inline struct { unsigned x; } threadIdx;
inline struct { unsigned x, y, z; } blockIdx, gridDim;

namespace emulated {
inline void pause(Wait wait) {
  const unsigned self = threadIdx.x;
  threads[self]->wait = wait;
  swapcontext(&threads[self]->context, &scheduler);
  threadIdx.x = self;
}
inline void entry() {
  const unsigned self = threadIdx.x;
  body();
  threads[self]->wait = Wait::ended;
  swapcontext(&threads[self]->context, &scheduler);
}
inline bool release(size_t from, size_t to, Wait wait) {
  for (size_t t = from; t < to; ++t)
    if (threads[t]->wait != wait) return false;
  for (size_t t = from; t < to; ++t) threads[t]->wait = Wait::no;
  return true;
}
inline void run_block(int count) {
  threads.clear();
  for (int t = 0; t < count; ++t) {
    threads.push_back(std::make_unique<Thread>());
    Thread& thread = *threads.back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
  }
  while (true) {
    bool ran = false;
    for (int t = 0; t < count; ++t) {
      if (threads[t]->wait != Wait::no) continue;
      ran = true;
      threadIdx.x = t;
      swapcontext(&scheduler, &threads[t]->context);
    }
    bool released = release(0, count, Wait::block);
    for (int t = 0; t < count; t += 32) released |= release(t, t + 32, Wait::warp);
    if (ran || released) continue;
    for (auto& thread : threads)
      if (thread->wait != Wait::ended) fail("a barrier that not all threads reach");
    return;
  }
}
}  // namespace emulated

inline void __syncthreads() { emulated::pause(emulated::Wait::block); }
inline void __syncwarp() { emulated::pause(emulated::Wait::warp); }

// Meaning of ldmatrix.x4 and mma.m16n8k16: PTX ISA, "Warp-level matrix instructions".
inline void load_matrices(uint32_t (&into)[4], const void* row) {
  const unsigned self = threadIdx.x, base = self / 32 * 32, lane = self % 32;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a misaligned row of a matrix");
  emulated::exchange[self] = row;
  __syncwarp();
  for (unsigned m = 0; m < 4; ++m)
    std::memcpy(&into[m], static_cast<const char*>(emulated::exchange[base + m * 8 + lane / 4]) + lane % 4 * 4, 4);
  __syncwarp();
}

template <typename T> inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned self = threadIdx.x, base = self / 32 * 32, lane = self % 32;
  uint32_t (&mine)[6] = emulated::registers[self];
  std::copy(a, a + 4, mine);
  mine[4] = b0;
  mine[5] = b1;
  __syncwarp();
  const auto half_of = [](uint32_t word, unsigned which) {
    T made;
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * which);
    std::memcpy(&made, &bits, 2);
    return to_float(made);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (unsigned at = 0; at < 16; ++at) {
      const uint32_t left = emulated::registers[base + m % 8 * 4 + at % 8 / 2][m / 8 + at / 8 * 2];
      const uint32_t right = emulated::registers[base + n * 4 + at % 8 / 2][4 + at / 8];
      c[i] += half_of(left, at % 2) * half_of(right, at % 2);
    }
  }
  __syncwarp();
}

inline int choose_device(int) { return 0; }

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void*, Arguments... arguments) {
  gridDim = {grid.x, grid.y, grid.z};
  emulated::body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        // NaN everywhere: what a kernel reads it must have written.
        emulated::shared.assign(shared_bytes, 0xff);
        blockIdx = {x, y, z};
        emulated::run_block(threads);
      }
  return 0;
}
