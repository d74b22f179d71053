// Sizes and rates as users type them.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "ferry/base/error.h"
#include "ferry/base/units.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    uint64_t bytes = ferry::parse_bytes(text);
    ferry::parse_bytes(ferry::format_bytes(bytes / 2));
    if (ferry::parse_rate(text) != bytes) std::abort();
  } catch (const ferry::ArgumentError&) {
  }
  try {
    ferry::parse_rate(text);
  } catch (const ferry::ArgumentError&) {
  }
  return 0;
}
