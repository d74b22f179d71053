// What a cold pass is measured with: nothing of the weights in memory, but memory to be had.
#pragma once

#include <cstdint>
#include <cstring>

#include "ferry/io/read_engine.h"

namespace ferry::bench {

// Takes memory and gives it back: what was given back before may have gone to a hypervisor, and
// what it costs to have it again is not to be measured.
inline void warm_memory(uint64_t bytes) {
  io::AlignedBuffer memory(bytes);
  std::memset(memory.data(), 1, bytes);
}

}  // namespace ferry::bench
