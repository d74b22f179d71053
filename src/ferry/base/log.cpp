// The only source that sees spdlog (see CMakeLists.txt for why).
#include "ferry/base/log_sink.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/base_sink.h>

#include <atomic>
#include <cctype>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>

#include "ferry/base/terminal.h"

namespace ferry::log {
namespace {

// Hands finished lines to the terminal, which knows whether a progress bar has to move.
class StderrSink : public spdlog::sinks::base_sink<std::mutex> {
 protected:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    terminal::write_line({line.data(), line.size()});
  }
  void flush_() override {}
};

spdlog::level::level_enum to_spdlog(Level level) {
  switch (level) {
    case Level::trace:
      return spdlog::level::trace;
    case Level::debug:
      return spdlog::level::debug;
    case Level::info:
      return spdlog::level::info;
    case Level::warn:
      return spdlog::level::warn;
    case Level::error:
      return spdlog::level::err;
    case Level::off:
      return spdlog::level::off;
  }
  return spdlog::level::off;
}

// Never destroyed, so that threads and static objects may log until the very end.
struct State {
  std::atomic<Level> level{Level::info};
  std::mutex mutex;
  Sink sink;  // guarded by mutex
  spdlog::logger logger{"ferry", std::make_shared<StderrSink>()};

  State() {
    logger.set_level(spdlog::level::trace);
    logger.set_pattern("%H:%M:%S.%e %^%l%$ %v");
    const char* wanted = std::getenv("FERRY_LOG");
    if (wanted == nullptr || *wanted == '\0') return;
    if (auto parsed = level_from_name(wanted)) {
      level = *parsed;
    } else {
      logger.warn("FERRY_LOG={} is unknown; expected trace, debug, info, warn, error or off",
                  wanted);
    }
  }
};

State& state() {
  static State* instance = new State;
  return *instance;
}

}  // namespace

std::string_view name(Level level) {
  switch (level) {
    case Level::trace:
      return "trace";
    case Level::debug:
      return "debug";
    case Level::info:
      return "info";
    case Level::warn:
      return "warn";
    case Level::error:
      return "error";
    case Level::off:
      return "off";
  }
  return "?";
}

std::optional<Level> level_from_name(std::string_view text) {
  std::string lower;
  for (unsigned char c : text) lower += static_cast<char>(std::tolower(c));
  if (lower == "warning") return Level::warn;
  for (int i = 0; i <= static_cast<int>(Level::off); ++i) {
    if (name(static_cast<Level>(i)) == lower) return static_cast<Level>(i);
  }
  return std::nullopt;
}

Level level() {
  return state().level.load(std::memory_order_relaxed);
}
void set_level(Level level) {
  state().level = level;
}

void write(Level level, std::string_view message) {
  if (!enabled(level)) return;
  State& s = state();
  std::lock_guard lock(s.mutex);
  if (s.sink) {
    s.sink(level, message);
  } else {
    s.logger.log(to_spdlog(level), spdlog::string_view_t(message.data(), message.size()));
  }
}

void set_sink(Sink sink) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.sink = std::move(sink);
}

}  // namespace ferry::log
