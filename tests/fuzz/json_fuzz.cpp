// The JSON reader on any bytes. What it accepts must survive being printed and read again.
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    nlohmann::json value = ferry::io::parse_json(text, "input");
    std::string printed = value.dump();
    if (ferry::io::parse_json(printed, "printed").dump() != printed) std::abort();
  } catch (const ferry::FormatError&) {
  }
  return 0;
}
