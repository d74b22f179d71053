// Putting byte planes together again. Internal to io/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace ferry::io {

// out[i] = rotate right by one of (planes[0][i] << 8 | planes[1][i]), or of four bytes, highest
// first. No alignment is needed; `out` takes count x 2 (or x 4) bytes.
struct PlaneMerge {
  const char* name;
  void (*merge2)(const uint8_t* const* planes, size_t count, void* out);
  void (*merge4)(const uint8_t* const* planes, size_t count, void* out);
};

// The fastest that this CPU has, or the one of that name; null if this CPU (or this build) has not.
const PlaneMerge& best_plane_merge();
const PlaneMerge* find_plane_merge(std::string_view name);

}  // namespace ferry::io
