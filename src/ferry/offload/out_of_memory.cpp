#include "ferry/offload/out_of_memory.h"

#include <ATen/DeviceAccelerator.h>

#include "ferry/base/error.h"
#include "ferry/base/units.h"

namespace ferry::offload {

uint64_t asked_bytes(const std::string& message) {
  constexpr std::string_view kBefore = "Tried to allocate ";
  const size_t found = message.find(kBefore);
  if (found == std::string::npos) return 0;
  const size_t begin = found + kBefore.size();
  const size_t unit = message.find(' ', begin);
  if (unit == std::string::npos) return 0;
  std::string size = message.substr(begin, unit - begin);
  // "512 bytes", or "2.00 GiB".
  const size_t end = message.find_first_not_of("KMGTiB", unit + 1);
  if (end != unit + 1) size += message.substr(unit + 1, end - (unit + 1));
  try {
    return parse_bytes(size);
  } catch (const ArgumentError&) {
    return 0;
  }
}

DeviceMemory free_cached_memory(at::Device device) {
  at::accelerator::emptyCache();
  const auto [free, total] = at::accelerator::getMemoryInfo(device.index());
  return {free, total};
}

}  // namespace ferry::offload
