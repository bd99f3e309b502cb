// A team of threads that goes through one decoder step together. A step has some three hundred short phases; to fork and join
// for each costs microseconds, and milliseconds where cores are shared, because a join waits for threads that got no time. Here
// the threads are started once a step and all walk through the same phases; in each, whoever is there takes the next unit of work.
// A thread that comes late finds the phases done and skips them. Which thread does a unit changes no bit of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include <sched.h>

#include <ATen/Parallel.h>

namespace sextant {

class Team {
 public:
  // Threads that a team started here and now may have.
  static int64_t size() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

  // `step(member)` runs on every thread; it must make the same calls of Member::phase everywhere. Rethrows the first exception of
  // a unit, after which the remaining units of the step are skipped.
  template <typename Step>
  static void run(const Step& step) {
    const int64_t threads = size();
    Team team(threads);
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      if (first == last) return;
      Member member(team);
      step(member);
    });
    if (team.error_) std::rethrow_exception(team.error_);
  }

  class Member {
   public:
    explicit Member(Team& team) : team_(team) {}

    int64_t threads() const { return team_.threads_; }

    // work(first, last) over 0 ... count - 1 in units of `grain`; returns when all of them are done, whoever did them.
    template <typename Work>
    void phase(int64_t count, int64_t grain, const Work& work) {
      const uint64_t now = phase_++;
      if (count <= 0) {
        team_.skip(now);
        return;
      }
      const uint64_t units = static_cast<uint64_t>((count + grain - 1) / grain);
      uint64_t ticket = team_.ticket_.load(std::memory_order_acquire);
      while (ticket >> kUnitBits == now) {
        const uint64_t unit = ticket & kUnitMask;
        if (unit >= units) {  // all taken: wait for those who work
          team_.wait_for_end_of(now);
          return;
        }
        if (!team_.ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        const int64_t first = static_cast<int64_t>(unit) * grain;
        team_.guarded([&] { work(first, first + grain < count ? first + grain : count); });
        if (team_.done_.fetch_add(1, std::memory_order_acq_rel) + 1 == units) team_.next(now);
        ticket = team_.ticket_.load(std::memory_order_acquire);
      }
    }

    // `count` pieces dealt so that each thread gets a few units: contiguous enough for memory to stream, small enough that a
    // thread which has lost its core costs the others little.
    template <typename Work>
    void spread(int64_t count, const Work& work) {
      const int64_t units = threads() == 1 ? 1 : 4 * threads();
      phase(count, (count + units - 1) / units > 0 ? (count + units - 1) / units : 1, work);
    }

    // A piece of serial work that all wait for.
    template <typename Work>
    void alone(const Work& work) {
      phase(1, 1, [&](int64_t, int64_t) { work(); });
    }

   private:
    Team& team_;
    uint64_t phase_ = 0;
  };

 private:
  static constexpr int kUnitBits = 32;
  static constexpr uint64_t kUnitMask = (uint64_t{1} << kUnitBits) - 1;

  explicit Team(int64_t threads) : threads_(threads) {}

  void next(uint64_t phase) {
    done_.store(0, std::memory_order_relaxed);
    ticket_.store((phase + 1) << kUnitBits, std::memory_order_release);
  }

  // An empty phase: whoever comes first closes it.
  void skip(uint64_t phase) {
    uint64_t expected = phase << kUnitBits;
    ticket_.compare_exchange_strong(expected, (phase + 1) << kUnitBits, std::memory_order_acq_rel);
  }

  void wait_for_end_of(uint64_t phase) const {
    constexpr int kSpins = 4000;  // some tens of microseconds; longer means that a thread has lost its core
    for (int spins = 0; ticket_.load(std::memory_order_acquire) >> kUnitBits == phase; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

  // A unit that throws must still be counted, or the others would wait for it for ever.
  template <typename Work>
  void guarded(const Work& work) noexcept {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }

  const int64_t threads_;
  alignas(64) std::atomic<uint64_t> ticket_{0};  // phase << 32 | next unit
  alignas(64) std::atomic<uint64_t> done_{0};    // units of the phase that are finished
  alignas(64) std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace sextant
