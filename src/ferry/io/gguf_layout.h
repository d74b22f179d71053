// What reader and writer of GGUF share: limits, alignment, sizes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ferry/io/ggml_type.h"

namespace ferry::io {

constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1 << 20;
// ggml itself reads four; tools for video models write five.
constexpr uint32_t kMaxDimensions = 8;

inline bool is_alignment(uint64_t value) {
  return value > 0 && value <= kMaxAlignment && (value & (value - 1)) == 0;
}

inline uint64_t align_up(uint64_t position, uint64_t alignment) {
  return (position + alignment - 1) & ~(alignment - 1);
}

// Bytes of a tensor of this shape (outermost first, no negative extent). Where there can be no such
// tensor, `problem` says why.
uint64_t gguf_tensor_bytes(GgmlType type, const std::vector<int64_t>& shape, std::string& problem);

}  // namespace ferry::io
