// What torch's CPU allocator gives out while a function runs: how much activations take at once.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>

namespace ferry::testing {

// Of the thread that it is attached to; what was allocated before and is freed meanwhile counts as
// negative.
class AllocationCounter : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t alloc_size, size_t, size_t, c10::Device) override {
    now += alloc_size;
    peak = std::max(peak, now);
  }
  bool memoryProfilingEnabled() const override { return true; }

  // Runs `body` while counting here.
  static void count(const std::shared_ptr<AllocationCounter>& counter,
                    const std::function<void()>& body) {
    c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, counter);
    body();
  }
  // The most at once.
  static int64_t peak_of(const std::function<void()>& body) {
    auto counter = std::make_shared<AllocationCounter>();
    count(counter, body);
    return counter->peak;
  }

  int64_t now = 0, peak = 0;
};

}  // namespace ferry::testing
