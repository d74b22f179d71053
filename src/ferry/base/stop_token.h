// Asking running work to stop: the owner keeps a StopSource, the work polls a StopToken.
#pragma once

#include <atomic>
#include <memory>

#include "ferry/base/error.h"

namespace ferry {

// Copies share one flag. Thread-safe. A default-constructed token never stops.
class StopToken {
 public:
  StopToken() = default;

  bool stop_requested() const noexcept { return flag_ && flag_->load(std::memory_order_relaxed); }
  // Throws Cancelled once a stop was requested.
  void throw_if_stopped() const {
    if (stop_requested()) throw Cancelled();
  }

 private:
  friend class StopSource;
  explicit StopToken(std::shared_ptr<const std::atomic<bool>> flag) : flag_(std::move(flag)) {}
  std::shared_ptr<const std::atomic<bool>> flag_;
};

// Copies share one flag. Thread-safe. request_stop() is async-signal-safe, so a program's own
// signal handler may call it (the library installs none) on a source that outlives the handler.
class StopSource {
 public:
  StopSource() : flag_(std::make_shared<std::atomic<bool>>(false)) {}

  void request_stop() const noexcept { flag_->store(true, std::memory_order_relaxed); }
  bool stop_requested() const noexcept { return flag_->load(std::memory_order_relaxed); }
  StopToken token() const { return StopToken(flag_); }

 private:
  static_assert(std::atomic<bool>::is_always_lock_free, "request_stop() runs in signal handlers");
  std::shared_ptr<std::atomic<bool>> flag_;
};

}  // namespace ferry
