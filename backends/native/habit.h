// Whether one node's product of one token is split among threads: tried both ways, then the faster, tried again at times.
//
// No rule on sizes can tell: a split pays where the weights are in a cache and idle threads poll for work, and costs time
// where they sleep or where one core already takes all that memory gives. Times only; results are the same either way.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace microvlm {

// Calls may overlap: then a time is lost, which does no harm.
class Habit {
 public:
  // Of the next product. Always true until a second thread was seen, so that one thread alone never asks a clock.
  bool split() {
    if (!helped_.load(std::memory_order_relaxed)) return true;
    const uint32_t n = calls_.fetch_add(1, std::memory_order_relaxed);
    if (n < kTrials) return n % 2 != 0;
    const bool faster = ns_[1].load(std::memory_order_relaxed) < ns_[0].load(std::memory_order_relaxed);
    return n % kTryAgain == 0 ? !faster : faster;
  }

  bool has_helpers() const { return helped_.load(std::memory_order_relaxed); }
  void see_helper() { helped_.store(true, std::memory_order_relaxed); }

  // A product took `ns`. An outlier moves the mean by a quarter of it at most.
  void note(bool split, float ns) {
    std::atomic<float>& mean = ns_[split];
    const float old = mean.load(std::memory_order_relaxed);
    if (old == 0.0f) return mean.store(ns, std::memory_order_relaxed);
    mean.store(old + ((ns < 2 * old ? ns : 2 * old) - old) / 4, std::memory_order_relaxed);
  }

 private:
  static constexpr uint32_t kTrials = 4, kTryAgain = 64;
  std::atomic<bool> helped_{false};
  std::atomic<uint32_t> calls_{0};
  std::atomic<float> ns_[2] = {{0.0f}, {0.0f}};
};

inline float elapsed_ns(std::chrono::steady_clock::time_point began) {
  return std::chrono::duration<float, std::nano>(std::chrono::steady_clock::now() - began).count();
}

}  // namespace microvlm
