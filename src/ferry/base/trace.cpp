#include "ferry/base/trace.h"

#include <fmt/format.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <iterator>

namespace ferry {
namespace {

// base/ has no JSON library. Bytes that are not UTF-8 would make the whole file unreadable, so
// anything outside ASCII that does not decode is replaced.
size_t utf8_length(std::string_view text, size_t at) {
  auto lead = static_cast<unsigned char>(text[at]);
  size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || at + length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((static_cast<unsigned char>(text[at + i]) & 0xc0) != 0x80) return 0;
  }
  auto second = static_cast<unsigned char>(text[at + 1]);
  // Overlong forms, surrogates, beyond U+10FFFF.
  if ((lead == 0xe0 && second < 0xa0) || (lead == 0xed && second > 0x9f) ||
      (lead == 0xf0 && second < 0x90) || (lead == 0xf4 && second > 0x8f)) {
    return 0;
  }
  return length;
}

void append_string(std::string& out, std::string_view text) {
  out += '"';
  for (size_t i = 0; i < text.size(); ++i) {
    auto c = static_cast<unsigned char>(text[i]);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20) {
      fmt::format_to(std::back_inserter(out), "\\u{:04x}", c);
    } else if (c < 0x80) {
      out += static_cast<char>(c);
    } else if (size_t length = utf8_length(text, i); length > 0) {
      out += text.substr(i, length);
      i += length - 1;
    } else {
      out += "\\ufffd";
    }
  }
  out += '"';
}

}  // namespace

Trace::Trace(size_t max_events) : start_(Clock::now()), max_events_(max_events) {}

int64_t Trace::since_start(Clock::time_point at) const {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(at - start_).count();
}

int Trace::track_locked(std::string_view name) {
  auto found = tracks_.find(name);
  if (found == tracks_.end()) {
    found = tracks_.emplace(std::string(name), static_cast<int>(tracks_.size()) + 1).first;
  }
  return found->second;
}

void Trace::add(Event event, std::string_view track) {
  std::string thread;
  if (track.empty()) {
    thread = fmt::format("thread {}", ::syscall(SYS_gettid));
    track = thread;
  }
  std::lock_guard lock(mutex_);
  if (events_.size() >= max_events_) {
    ++dropped_;
    return;
  }
  event.track = track_locked(track);
  events_.push_back(std::move(event));
}

void Trace::complete(std::string_view category, std::string_view name, Clock::time_point begin,
                     Clock::time_point end, std::string_view track, Args args) {
  int64_t from = since_start(begin);
  int64_t duration = std::max<int64_t>(0, since_start(end) - from);
  add({'X', 0, from, duration, 0, std::string(category), std::string(name), std::move(args)},
      track);
}

void Trace::instant(std::string_view category, std::string_view name, std::string_view track,
                    Args args) {
  add({'i', 0, since_start(Clock::now()), 0, 0, std::string(category), std::string(name),
       std::move(args)},
      track);
}

void Trace::counter(std::string_view name, double value) {
  add({'C', 0, since_start(Clock::now()), 0, value, "counter", std::string(name), {}}, "counters");
}

size_t Trace::size() const {
  std::lock_guard lock(mutex_);
  return events_.size();
}

std::string Trace::to_json() const {
  std::lock_guard lock(mutex_);
  const int pid = ::getpid();
  std::string out = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
  auto to = std::back_inserter(out);
  fmt::format_to(to,
                 "{{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":{},\"tid\":0,"
                 "\"args\":{{\"name\":\"ferry\"}}}}",
                 pid);
  for (const auto& [name, id] : tracks_) {
    fmt::format_to(to,
                   ",\n{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":{},\"tid\":{},"
                   "\"args\":{{\"name\":",
                   pid, id);
    append_string(out, name);
    out += "}}";
  }
  for (const Event& event : events_) {
    fmt::format_to(to,
                   ",\n{{\"ph\":\"{}\",\"pid\":{},\"tid\":{},\"ts\":{:.3f},\"cat\":", event.phase,
                   pid, event.track, static_cast<double>(event.begin_ns) / 1e3);
    append_string(out, event.category);
    out += ",\"name\":";
    append_string(out, event.name);
    if (event.phase == 'X') {
      fmt::format_to(to, ",\"dur\":{:.3f}", static_cast<double>(event.duration_ns) / 1e3);
    }
    if (event.phase == 'i') out += ",\"s\":\"t\"";
    if (event.phase == 'C') {
      double value = std::isfinite(event.value) ? event.value : 0.0;  // JSON has no NaN
      fmt::format_to(to, ",\"args\":{{\"value\":{}}}", value);
    } else if (!event.args.empty()) {
      out += ",\"args\":{";
      for (size_t i = 0; i < event.args.size(); ++i) {
        if (i > 0) out += ',';
        append_string(out, event.args[i].first);
        out += ':';
        append_string(out, event.args[i].second);
      }
      out += '}';
    }
    out += '}';
  }
  fmt::format_to(to, "\n],\"otherData\":{{\"dropped_events\":\"{}\"}}}}\n", dropped_);
  return out;
}

TraceSpan::TraceSpan(Trace* trace, std::string_view category, std::string_view name,
                     std::string_view track)
    : trace_(trace) {
  if (trace_ == nullptr) return;
  category_ = category;
  name_ = name;
  track_ = track;
  begin_ = Trace::Clock::now();
}

TraceSpan::~TraceSpan() {
  if (trace_ == nullptr) return;
  trace_->complete(category_, name_, begin_, Trace::Clock::now(), track_, std::move(args_));
}

void TraceSpan::arg(std::string_view key, std::string_view value) {
  if (trace_ != nullptr) args_.emplace_back(key, value);
}

}  // namespace ferry
