// The part of logging that needs no {fmt}: levels, sinks and the one function that writes. Use
// base/log.h to log.
#pragma once

#include <functional>
#include <optional>
#include <string_view>

namespace ferry::log {

enum class Level : int { trace, debug, info, warn, error, off };

std::string_view name(Level level);
// "trace", "debug", "info", "warn" or "warning", "error", "off", in any case; nothing for others.
std::optional<Level> level_from_name(std::string_view name);

// The least level that is written: what set_level() said, else FERRY_LOG, else info.
Level level();
void set_level(Level level);
inline bool enabled(Level wanted) {
  return wanted >= level() && wanted != Level::off;
}

// Writes one message, to the sink or else to stderr. Thread-safe; messages never interleave, and a
// progress bar on the terminal is redrawn below them.
void write(Level level, std::string_view message);

// Receives every message that passes the level instead of stderr; an empty function restores
// stderr. Called under a lock, one message at a time, from whichever thread logs: it must not log
// itself.
using Sink = std::function<void(Level, std::string_view)>;
void set_sink(Sink sink);

}  // namespace ferry::log
