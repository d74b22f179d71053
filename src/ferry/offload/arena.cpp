#include "ferry/offload/arena.h"

#include <algorithm>

#include "ferry/base/error.h"

namespace ferry::offload {

namespace {
uint64_t round_up(uint64_t value) {
  return (value + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
}
}  // namespace

Arena::Arena(uint64_t size_bytes) : buffer_(round_up(size_bytes), kAlignment) {}

std::optional<uint64_t> Arena::allocate(uint64_t size_bytes) {
  const uint64_t size = std::max(round_up(size_bytes), kAlignment);
  // The holes from `begin` on whose start is below `end`; the first that is large enough.
  auto search = [&](uint64_t begin, uint64_t end) -> std::optional<uint64_t> {
    uint64_t hole = begin;
    auto next = taken_.upper_bound(begin);
    if (next != taken_.begin()) {
      auto previous = std::prev(next);
      hole = std::max(hole, previous->first + previous->second);
    }
    for (; hole < end; ++next) {
      uint64_t limit = next == taken_.end() ? buffer_.size_bytes() : next->first;
      if (limit >= hole + size) return hole;
      if (next == taken_.end()) break;
      hole = next->first + next->second;
    }
    return std::nullopt;
  };
  std::optional<uint64_t> offset = search(cursor_, buffer_.size_bytes());
  if (!offset) offset = search(0, cursor_);
  if (!offset) return std::nullopt;
  taken_.emplace(*offset, size);
  cursor_ = *offset + size;
  used_ += size;
  peak_ = std::max(peak_, used_);
  return offset;
}

void Arena::release(uint64_t offset) {
  auto entry = taken_.find(offset);
  if (entry == taken_.end()) throw_error<Error>("arena: offset {} was released twice", offset);
  used_ -= entry->second;
  taken_.erase(entry);
}

}  // namespace ferry::offload
