// The arena: one buffer, allocated once, through which streamed pieces flow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

#include "ferry/io/read_engine.h"

namespace ferry::offload {

// Hands out ranges next-fit: in steady state that is a ring, and a range that is released out of
// order leaves a hole instead of blocking the ring. Sizes differ freely. Not thread-safe.
class Arena {
 public:
  // What every range starts on and is rounded up to; a multiple of what O_DIRECT wants.
  static constexpr uint64_t kAlignment = 4096;

  Arena() = default;
  explicit Arena(uint64_t size_bytes);

  // The offset of a free range, or nothing if no hole is large enough.
  std::optional<uint64_t> allocate(uint64_t size_bytes);
  // REQUIRES: `offset` came from allocate() and nothing writes there any more.
  void release(uint64_t offset);

  std::byte* at(uint64_t offset) const { return buffer_.data() + offset; }
  uint64_t size_bytes() const { return buffer_.size_bytes(); }
  uint64_t used_bytes() const { return used_; }
  uint64_t peak_bytes() const { return peak_; }

 private:
  io::AlignedBuffer buffer_;
  std::map<uint64_t, uint64_t> taken_;  // offset -> size
  uint64_t cursor_ = 0;                 // where the last range ended
  uint64_t used_ = 0;
  uint64_t peak_ = 0;
};

}  // namespace ferry::offload
