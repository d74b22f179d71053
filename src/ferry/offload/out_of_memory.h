// What can be known and done when an accelerator's memory runs out.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>

namespace ferry::offload {

// How much the allocation that failed asked for, as torch's allocators say it ("Tried to allocate
// 2.00 GiB"); 0 if the message does not say.
uint64_t asked_bytes(const std::string& message);

struct DeviceMemory {
  uint64_t free_bytes = 0;
  uint64_t total_bytes = 0;
};
// Gives back what torch's allocator keeps for later, and says what is free then.
// REQUIRES: `device` is an accelerator.
DeviceMemory free_cached_memory(at::Device device);

}  // namespace ferry::offload
