#include "ferry/base/progress.h"

#include <fmt/format.h>

#include <algorithm>

#include "ferry/base/terminal.h"
#include "ferry/base/units.h"

namespace ferry {
namespace {

ProgressMode resolve(ProgressMode mode) {
  if (mode != ProgressMode::automatic) return mode;
  return terminal::is_interactive() ? ProgressMode::terminal : ProgressMode::lines;
}

// "0:03" for a clock that counts up; format_duration() would flicker between units.
std::string clock_text(double seconds) {
  auto whole = static_cast<uint64_t>(std::clamp(seconds, 0.0, 1e9));
  if (whole >= 3600) {
    return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

// At most `width` bytes, never half a UTF-8 character.
std::string clipped(std::string text, size_t width) {
  if (text.size() <= width) return text;
  while (width > 0 && (static_cast<unsigned char>(text[width]) & 0xc0) == 0x80) --width;
  text.resize(width);
  return text;
}

}  // namespace

ProgressBar::ProgressBar(std::string description, uint64_t total, ProgressOptions options)
    : description_(std::move(description)),
      total_(total),
      options_(std::move(options)),
      mode_(resolve(options_.mode)),
      start_(now()) {
  std::lock_guard lock(mutex_);
  if (mode_ == ProgressMode::terminal) update_locked(false);
}

ProgressBar::~ProgressBar() {
  std::lock_guard lock(mutex_);
  if (finished_ || mode_ != ProgressMode::terminal) return;
  try {
    std::string line = bar_line_locked(now());
    if (options_.output) {
      options_.output("\n");
    } else {
      terminal::set_status("");
      terminal::write_line(line);
    }
  } catch (...) {  // a progress bar is never worth a crash
  }
}

void ProgressBar::advance(uint64_t steps) {
  std::lock_guard lock(mutex_);
  done_ += steps;
  update_locked(false);
}

void ProgressBar::set(uint64_t done) {
  std::lock_guard lock(mutex_);
  done_ = done;
  update_locked(false);
}

void ProgressBar::set_note(std::string note) {
  std::lock_guard lock(mutex_);
  note_ = std::move(note);
}

void ProgressBar::finish() {
  std::lock_guard lock(mutex_);
  if (finished_) return;
  update_locked(true);
  finished_ = true;
}

void ProgressBar::update_locked(bool last) {
  if (finished_ || mode_ == ProgressMode::quiet) return;
  Clock::time_point at = now();
  if (mode_ == ProgressMode::lines) {
    int quarter = total_ > 0 ? static_cast<int>(std::min(done_, total_) * 4 / total_) : 0;
    // The first step tells how long the rest will take.
    bool due = last ? quarter_ < 4 : (done_ > 0 && quarter > quarter_);
    if (!due) return;
    quarter_ = last ? 4 : quarter;
    std::string line = text_locked(at) + "\n";
    if (options_.output) {
      options_.output(line);
    } else {
      terminal::write_line(line);
    }
    return;
  }
  bool complete = total_ > 0 && done_ >= total_;
  if (!last && !complete && last_draw_ != Clock::time_point{} &&
      at - last_draw_ < options_.redraw_interval) {
    return;
  }
  last_draw_ = at;
  std::string line = bar_line_locked(at);
  if (options_.output) {
    options_.output("\r\x1b[2K" + line + (last ? "\n" : ""));
  } else if (last) {
    terminal::set_status("");
    terminal::write_line(line);
  } else {
    terminal::set_status(line);
  }
}

// "2/4 [0:03<0:03, 1.52 s/it] note", with the description before it in `lines` mode.
std::string ProgressBar::text_locked(Clock::time_point at) const {
  double elapsed = std::chrono::duration<double>(at - start_).count();
  std::string text = mode_ == ProgressMode::lines ? description_ + ": " : "";
  text += total_ > 0 ? fmt::format("{}/{}", done_, total_) : fmt::format("{}", done_);
  text += fmt::format(" [{}", clock_text(elapsed));
  if (done_ > 0) {
    double each = elapsed / static_cast<double>(done_);
    if (total_ > done_) {
      text += fmt::format("<{}", clock_text(each * static_cast<double>(total_ - done_)));
    }
    text += each >= 1 || each <= 0 ? fmt::format(", {:.2f} s/it", each)
                                   : fmt::format(", {:.2f} it/s", 1 / each);
  }
  text += "]";
  if (!note_.empty()) text += " " + note_;
  return text;
}

std::string ProgressBar::bar_line_locked(Clock::time_point at) const {
  auto width = static_cast<size_t>(
      std::max(8, (options_.columns > 0 ? options_.columns : terminal::columns()) - 1));
  std::string numbers = text_locked(at);
  if (total_ == 0) return clipped(description_ + " " + numbers, width);
  uint64_t done = std::min(done_, total_);
  std::string head = fmt::format("{} {:3d}%", description_, done * 100 / total_);
  size_t used = head.size() + numbers.size() + 3;
  size_t cells = used < width ? std::min<size_t>(width - used, 30) : 0;
  if (cells < 4) return clipped(head + " " + numbers, width);
  auto filled = static_cast<size_t>(static_cast<double>(done) / static_cast<double>(total_) *
                                    static_cast<double>(cells));
  return clipped(fmt::format("{}|{}{}| {}", head, std::string(filled, '#'),
                             std::string(cells - filled, ' '), numbers),
                 width);
}

}  // namespace ferry
