// Logging: log::info("read {} tensors", n). To stderr or to an application's sink (log_sink.h).
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

#include "ferry/base/log_sink.h"

namespace ferry::log {

// The level that a user's option or variable names. Throws ArgumentError.
Level parse_level(std::string_view name);

template <class... Args>
void write_formatted(Level level, fmt::format_string<Args...> format, Args&&... args) {
  if (enabled(level)) write(level, fmt::format(format, std::forward<Args>(args)...));
}

template <class... Args>
void trace(fmt::format_string<Args...> format, Args&&... args) {
  write_formatted(Level::trace, format, std::forward<Args>(args)...);
}
template <class... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  write_formatted(Level::debug, format, std::forward<Args>(args)...);
}
template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  write_formatted(Level::info, format, std::forward<Args>(args)...);
}
template <class... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  write_formatted(Level::warn, format, std::forward<Args>(args)...);
}
template <class... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  write_formatted(Level::error, format, std::forward<Args>(args)...);
}

}  // namespace ferry::log
