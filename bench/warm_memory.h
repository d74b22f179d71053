// What a cold pass is measured with: nothing of the weights in memory, but memory to be had.
#pragma once

#include <cstdint>
#include <cstring>

#include "ferry/io/read_engine.h"

namespace ferry::bench {

// Takes memory and gives it back: what was given back before may have gone to a hypervisor, and
// what it costs to have it again (0.03 to 0.4 s for 256 MiB) is not to be measured. Several times
// `bytes`, since whoever takes that much next need not be given the same.
inline void warm_memory(uint64_t bytes) {
  io::AlignedBuffer memory(4 * bytes);
  std::memset(memory.data(), 1, memory.size_bytes());
}

}  // namespace ferry::bench
