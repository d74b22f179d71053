#include "ferry/offload/arena.h"

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"

namespace ferry::offload {

Arena::Arena(Memory memory) : memory_(std::move(memory)) {}

void Arena::take(uint64_t offset, uint64_t size) {
  taken_.emplace(offset, size);
  used_ += size;
  peak_ = std::max(peak_, used_);
}

uint64_t Arena::ring_end() const {
  uint64_t end = std::min(ring_bytes_, size_bytes());
  for (uint64_t offset : lasting_) {
    if (offset >= end) break;
    end = std::min(end + taken_.at(offset), size_bytes());
  }
  return end;
}

// The first hole that begins in [begin, end) and is large enough below `limit`.
std::optional<uint64_t> Arena::search(uint64_t size, uint64_t begin, uint64_t end,
                                      uint64_t limit) const {
  uint64_t hole = begin;
  auto next = taken_.upper_bound(begin);
  if (next != taken_.begin()) {
    auto previous = std::prev(next);
    hole = std::max(hole, previous->first + previous->second);
  }
  for (; hole < end; ++next) {
    const uint64_t hole_end = next == taken_.end() ? limit : std::min(next->first, limit);
    if (hole_end >= hole + size) return hole;
    if (next == taken_.end()) break;
    hole = next->first + next->second;
  }
  return std::nullopt;
}

std::optional<uint64_t> Arena::allocate(uint64_t size_bytes) {
  const uint64_t size = std::max(round_up(size_bytes), kAlignment);
  if (ring_used_ + size > ring_bytes_) return std::nullopt;
  if (ring_used_ == 0) cursor_ = 0;  // nothing to go around: the largest hole
  const uint64_t ring = ring_end(), all = this->size_bytes();
  std::optional<uint64_t> offset = search(size, cursor_, ring, ring);
  if (!offset) offset = search(size, 0, cursor_, ring);
  if (!offset) offset = search(size, 0, all, all);
  if (!offset) return std::nullopt;
  return take_streamed(*offset, size);
}

std::optional<uint64_t> Arena::allocate_in_turn(uint64_t size_bytes) {
  const uint64_t size = std::max(round_up(size_bytes), kAlignment);
  if (ring_used_ + size > ring_bytes_) return std::nullopt;
  if (ring_used_ == 0) return allocate(size_bytes);
  uint64_t end = ring_end();
  bool from_start = false;
  for (uint64_t offset = cursor_;;) {
    if (offset + size > end) {
      if (!std::exchange(from_start, true)) {
        offset = 0;
      } else if (std::exchange(end, this->size_bytes()) == this->size_bytes()) {
        return std::nullopt;
      }
      continue;
    }
    auto next = taken_.upper_bound(offset);
    if (next != taken_.begin() && std::prev(next)->first + std::prev(next)->second > offset) --next;
    if (next == taken_.end() || next->first >= offset + size) return take_streamed(offset, size);
    if (lasting_.count(next->first) == 0) return std::nullopt;
    offset = next->first + next->second;
  }
}

uint64_t Arena::take_streamed(uint64_t offset, uint64_t size) {
  take(offset, size);
  cursor_ = offset + size;
  ring_used_ += size;
  return offset;
}

std::optional<uint64_t> Arena::allocate_lasting(uint64_t size_bytes) {
  const uint64_t size = std::max(round_up(size_bytes), kAlignment);
  uint64_t limit = this->size_bytes();
  for (auto entry = taken_.rbegin(); entry != taken_.rend(); ++entry) {
    const uint64_t end = entry->first + entry->second;
    if (limit >= end + size) break;
    limit = entry->first;
  }
  if (limit < size) return std::nullopt;
  take(limit - size, size);
  lasting_.insert(limit - size);
  return limit - size;
}

void Arena::make_lasting(uint64_t offset) {
  if (lasting_.insert(offset).second) ring_used_ -= taken_.at(offset);
}

void Arena::release(uint64_t offset, Fence fence) {
  auto entry = taken_.find(offset);
  if (entry == taken_.end()) throw_error<Error>("arena: offset {} was released twice", offset);
  used_ -= entry->second;
  if (lasting_.erase(offset) == 0) {
    ring_used_ -= entry->second;
    // The last one, taken back before it was used: its turn comes again.
    if (!fence && offset + entry->second == cursor_) cursor_ = offset;
  }
  if (fence) fences_.push_back({offset, offset + entry->second, std::move(fence)});
  taken_.erase(entry);
}

std::vector<Fence> Arena::take_fences(uint64_t offset) {
  const uint64_t end = offset + taken_.at(offset);
  std::vector<Fence> found;
  std::vector<Fenced> left;
  for (Fenced& fenced : fences_) {
    if (fenced.end <= offset || fenced.begin >= end) {
      left.push_back(std::move(fenced));
      continue;
    }
    if (fenced.begin < offset) left.push_back({fenced.begin, offset, fenced.fence});
    if (fenced.end > end) left.push_back({end, fenced.end, fenced.fence});
    found.push_back(std::move(fenced.fence));
  }
  fences_ = std::move(left);
  return found;
}

}  // namespace ferry::offload
