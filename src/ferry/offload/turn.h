// Whose turn it is on an engine: first come, first served, by thread.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

namespace ferry::offload {

// A fair lock that the thread that holds it may enter again. Two pipelines that share an engine
// take turns with it a pass at a time, so that the leases of one never wait for those of the other.
// Thread-safe.
class Turn {
 public:
  void enter();
  void leave() noexcept;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<uint64_t> waiting_;
  uint64_t next_ = 0;
  std::thread::id owner_;
  int depth_ = 0;
};

}  // namespace ferry::offload
