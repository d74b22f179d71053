#include "ferry/offload/turn.h"

namespace ferry::offload {

void Turn::enter() {
  std::unique_lock lock(mutex_);
  const auto self = std::this_thread::get_id();
  if (depth_ > 0 && owner_ == self) {
    ++depth_;
    return;
  }
  const uint64_t ticket = next_++;
  waiting_.push_back(ticket);
  changed_.wait(lock, [&] { return depth_ == 0 && waiting_.front() == ticket; });
  waiting_.pop_front();
  owner_ = self;
  depth_ = 1;
}

void Turn::leave() noexcept {
  std::lock_guard lock(mutex_);
  if (--depth_ == 0) changed_.notify_all();
}

}  // namespace ferry::offload
