#include "ferry/base/error.h"
#include "ferry/base/log.h"

namespace ferry::log {

Level parse_level(std::string_view name) {
  if (auto level = level_from_name(name)) return *level;
  throw_error<ArgumentError>(
      "log level \"{}\" is unknown; expected trace, debug, info, warn, error or off", name);
}

}  // namespace ferry::log
