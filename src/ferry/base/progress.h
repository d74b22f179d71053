// A progress bar for loops with a known number of steps.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>

namespace ferry {

enum class ProgressMode {
  automatic,  // terminal if stderr is one, else lines
  terminal,   // one line, redrawn
  lines,      // for pipes and log files: a line at the start's first step, each quarter and the end
  quiet,
};

struct ProgressOptions {
  ProgressMode mode = ProgressMode::automatic;
  // Width of the terminal; 0 asks it.
  int columns = 0;
  // Redraws are at least this far apart.
  std::chrono::milliseconds redraw_interval{80};
  // Where lines and redraws go, for tests and applications; empty: stderr, between log lines.
  std::function<void(std::string_view)> output;
  // The clock, for tests.
  std::function<std::chrono::steady_clock::time_point()> now;
};

// "denoising  50%|#####     | 2/4 [0:03<0:03, 1.52 s/it]". Thread-safe. The destructor leaves the
// line as it stands, so what an exception interrupted stays visible.
class ProgressBar {
 public:
  // `total` 0: unknown, only counts.
  ProgressBar(std::string description, uint64_t total, ProgressOptions options = {});
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void advance(uint64_t steps = 1);
  void set(uint64_t done);
  // Shown behind the numbers ("1.9 GB read").
  void set_note(std::string note);
  // Draws the end and moves on to the next line. Idempotent.
  void finish();

  ProgressMode mode() const { return mode_; }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point now() const { return options_.now ? options_.now() : Clock::now(); }
  void update_locked(bool last);
  std::string text_locked(Clock::time_point at) const;
  std::string bar_line_locked(Clock::time_point at) const;

  const std::string description_;
  const uint64_t total_;
  const ProgressOptions options_;
  ProgressMode mode_;
  Clock::time_point start_;

  std::mutex mutex_;
  uint64_t done_ = 0;  // guarded by mutex_, as are those below
  std::string note_;
  Clock::time_point last_draw_{};
  int quarter_ = -1;  // the last one that got a line
  bool finished_ = false;
};

}  // namespace ferry
