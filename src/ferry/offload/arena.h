// The arena: one piece of memory, allocated once, that holds residents and through which streamed
// pieces flow.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "ferry/offload/memory.h"

namespace ferry::offload {

// What a later writer of a range has to wait for; null where compute is done when a call returns.
using Fence = std::shared_ptr<const c10::Event>;

// Hands out ranges of one Memory. Streamed ranges that are asked for in turn go around a ring,
// strictly one behind the other: where each lies then follows from the order alone, not from which
// of two was released first, and a plan that was simulated runs as simulated. Who cannot wait takes
// the next hole that is large enough. Lasting ranges (residents) come from the end, so that they do
// not split the ring. Sizes differ freely. Not thread-safe.
class Arena {
 public:
  // What every range starts on and is rounded up to; a multiple of what O_DIRECT wants.
  static constexpr uint64_t kAlignment = 4096;
  static uint64_t round_up(uint64_t size_bytes) {
    return (size_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  Arena() = default;
  explicit Arena(Memory memory);

  // What streamed ranges may take together; the rest is for lasting ones.
  void set_ring_bytes(uint64_t bytes) { ring_bytes_ = bytes; }
  // The offset of a free range, in the ring where there is one; nothing if no hole is large enough.
  std::optional<uint64_t> allocate(uint64_t size_bytes);
  // Behind the last streamed range, or at the start if it does not fit before the ring's end; past
  // lasting ranges. Nothing if a streamed range is in the way, which will go.
  std::optional<uint64_t> allocate_in_turn(uint64_t size_bytes);
  std::optional<uint64_t> allocate_lasting(uint64_t size_bytes);
  // A streamed range stays after all.
  void make_lasting(uint64_t offset);
  // Whoever gets these bytes next has to wait for `fence` before it writes there.
  // REQUIRES: `offset` came from allocate() and, without a fence, nothing uses the bytes any more.
  void release(uint64_t offset, Fence fence = nullptr);
  // The fences of a range that was just allocated; they are not told again.
  std::vector<Fence> take_fences(uint64_t offset);

  // Whether a streamed range of this size stays within the ring.
  bool ring_has_room(uint64_t size_bytes) const {
    return ring_used_ + round_up(size_bytes) <= ring_bytes_;
  }

  const Memory& memory() const { return memory_; }
  std::byte* at(uint64_t offset) const { return memory_.data() + offset; }
  uint64_t size_bytes() const { return memory_.size_bytes(); }
  uint64_t used_bytes() const { return used_; }
  uint64_t peak_bytes() const { return peak_; }
  bool has_fences() const { return !fences_.empty(); }

 private:
  struct Fenced {
    uint64_t begin, end;
    Fence fence;
  };
  // The ring is the first bytes that nothing lasting takes, as many as are its share: what streams
  // elsewhere while residents arrive would leave them in its way for good.
  uint64_t ring_end() const;
  std::optional<uint64_t> search(uint64_t size, uint64_t begin, uint64_t end, uint64_t limit) const;
  void take(uint64_t offset, uint64_t size);
  uint64_t take_streamed(uint64_t offset, uint64_t size);

  Memory memory_;
  std::map<uint64_t, uint64_t> taken_;  // offset -> size
  std::vector<Fenced> fences_;
  std::set<uint64_t> lasting_;  // offsets of lasting ranges
  uint64_t ring_bytes_ = UINT64_MAX;
  uint64_t cursor_ = 0;  // where the last streamed range ended
  uint64_t ring_used_ = 0;
  uint64_t used_ = 0;
  uint64_t peak_ = 0;
};

}  // namespace ferry::offload
