// Memory for packed weights, in huge pages: a decode step streams all weights once, and with 4 KiB pages the walks of the page
// tables and the hardware prefetcher's stop at every page's end cost a third of the bandwidth (measured on Zen 4: 20 against
// 32 GB/s with one thread). Weights packed one after the other lie one after the other, as a step reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

namespace sextant {

// A run of pages that many weights share; it goes back to the system with the last of them.
class WeightRegion {
 public:
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  explicit WeightRegion(int64_t bytes) : size_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
    // One huge page more, so that there is a boundary to begin at.
    void* mapped = mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<char*>(mapped);
    begin_ = mapped_ + (kHugePage - reinterpret_cast<uintptr_t>(mapped_) % kHugePage) % kHugePage;
#ifdef MADV_HUGEPAGE
    madvise(begin_, size_, MADV_HUGEPAGE);  // a wish: without it everything works, more slowly
#endif
  }
  ~WeightRegion() { munmap(mapped_, size_ + kHugePage); }
  WeightRegion(const WeightRegion&) = delete;
  WeightRegion& operator=(const WeightRegion&) = delete;

  // `bytes` of it, or null when too little is left. Untouched pages take no memory.
  char* take(int64_t bytes) {
    if (used_ + bytes > size_) return nullptr;
    char* taken = begin_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    return taken;
  }

 private:
  char* mapped_;
  char* begin_;
  int64_t size_;
  int64_t used_ = 0;
};

// uint8 [bytes], 64-byte aligned, zeros.
inline at::Tensor weight_memory(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<WeightRegion> current;  // weak: the weights alone keep a region
  constexpr int64_t kRegion = int64_t{64} << 20;
  TORCH_CHECK_VALUE(bytes > 0, "a weight has at least one byte");
  const std::lock_guard<std::mutex> guard(mutex);
  std::shared_ptr<WeightRegion> region = current.lock();
  char* memory = region ? region->take(bytes) : nullptr;
  if (memory == nullptr) {
    region = std::make_shared<WeightRegion>(std::max(bytes, kRegion));
    memory = region->take(bytes);
    current = region;
  }
  return at::from_blob(memory, {bytes}, [region](void*) {}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace sextant
