#include "ferry/base/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <mutex>

namespace ferry::terminal {
namespace {

struct State {
  std::mutex mutex;
  std::string status;
};

State& state() {
  static State* instance = new State;  // never destroyed: threads may write until the very end
  return *instance;
}

// One write for one line: what others write to the same terminal cannot land in its middle.
void write_all(std::string_view text) {
  while (!text.empty()) {
    ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nobody is left to tell
    text.remove_prefix(static_cast<size_t>(n));
  }
}

constexpr std::string_view kEraseLine = "\r\x1b[2K";

}  // namespace

bool is_interactive() {
  const char* term = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) == 1 && term != nullptr && std::string_view(term) != "dumb";
}

int columns() {
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

void write_line(std::string_view line) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  std::string text;
  if (!s.status.empty()) text += kEraseLine;
  text += line;
  if (text.empty() || text.back() != '\n') text += '\n';
  text += s.status;
  write_all(text);
}

void set_status(std::string_view status) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  if (s.status.empty() && status.empty()) return;
  s.status = status;
  write_all(std::string(kEraseLine) + s.status);
}

}  // namespace ferry::terminal
