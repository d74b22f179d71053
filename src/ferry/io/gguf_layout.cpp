#include "ferry/io/gguf_layout.h"

#include <fmt/ranges.h>

#include <algorithm>

namespace ferry::io {

uint64_t gguf_tensor_bytes(GgmlType type, const std::vector<int64_t>& shape, std::string& problem) {
  // Extents of zero count as one at first: [0, 2^40, 2^40] is empty, and yet no shape that anyone
  // could compute strides for.
  int64_t elements = 1, bytes = 0;
  bool overflow = false;
  for (int64_t extent : shape) {
    overflow |= extent < 0;
    overflow |= __builtin_mul_overflow(elements, std::max<int64_t>(extent, 1), &elements);
  }
  const int64_t in_block = block_elements(type);
  overflow |= __builtin_mul_overflow(elements / in_block, block_bytes(type), &bytes);
  if (overflow) {
    problem = fmt::format("the shape [{}] is negative or too large", fmt::join(shape, ", "));
    return 0;
  }
  if (int64_t row = shape.empty() ? 1 : shape.back(); row % in_block != 0) {
    problem = fmt::format("rows of {} elements, expected whole {} blocks of {}", row, name(type),
                          in_block);
    return 0;
  }
  bool is_empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  return is_empty ? 0 : static_cast<uint64_t>(bytes);
}

}  // namespace ferry::io
