// Spans of time for chrome://tracing and ui.perfetto.dev.
#pragma once

#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ferry {

// Records spans. Thread-safe. Passed in where spans are made; a null pointer means no recording and
// costs nothing. Memory grows by about 100 bytes a span, up to `max_events`; later ones are counted
// and dropped.
class Trace {
 public:
  using Clock = std::chrono::steady_clock;
  // Shown with a span; values are text.
  using Args = std::vector<std::pair<std::string, std::string>>;

  explicit Trace(size_t max_events = 2'000'000);

  // A span from `begin` to `end`. `track` is the row it is drawn in ("reads", "compute"); an empty
  // one stands for the calling thread.
  void complete(std::string_view category, std::string_view name, Clock::time_point begin,
                Clock::time_point end, std::string_view track = {}, Args args = {});
  // A moment.
  void instant(std::string_view category, std::string_view name, std::string_view track = {},
               Args args = {});
  // A value over time ("bytes in flight").
  void counter(std::string_view name, double value);

  size_t size() const;
  // The whole trace in Chrome's JSON object format; times in microseconds since construction.
  std::string to_json() const;

 private:
  struct Event {
    char phase;
    int track;
    int64_t begin_ns;
    int64_t duration_ns;
    double value;
    std::string category;
    std::string name;
    Args args;
  };
  int64_t since_start(Clock::time_point at) const;
  void add(Event event, std::string_view track);
  int track_locked(std::string_view name);

  const Clock::time_point start_;
  const size_t max_events_;
  mutable std::mutex mutex_;
  std::vector<Event> events_;                       // guarded by mutex_
  std::map<std::string, int, std::less<>> tracks_;  // guarded by mutex_
  size_t dropped_ = 0;                              // guarded by mutex_
};

// A span that lasts from construction to destruction. Does nothing with a null trace.
class TraceSpan {
 public:
  TraceSpan(Trace* trace, std::string_view category, std::string_view name,
            std::string_view track = {});
  ~TraceSpan();
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

  void arg(std::string_view key, std::string_view value);

 private:
  Trace* trace_;
  std::string category_;
  std::string name_;
  std::string track_;
  Trace::Args args_;
  Trace::Clock::time_point begin_;
};

}  // namespace ferry
