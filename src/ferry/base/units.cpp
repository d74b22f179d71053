#include "ferry/base/units.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>

#include "ferry/base/error.h"

namespace ferry {
namespace {

std::string_view trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) {
    text.remove_prefix(1);
  }
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) {
    text.remove_suffix(1);
  }
  return text;
}

std::string lower(std::string_view text) {
  std::string out;
  for (unsigned char c : text) out += static_cast<char>(std::tolower(c));
  return out;
}

// 0 for an unknown suffix.
uint64_t multiplier(const std::string& suffix) {
  if (suffix.empty() || suffix == "b") return 1;
  constexpr std::string_view kPrefixes = "kmgtpe";
  size_t power = kPrefixes.find(suffix[0]);
  if (power == std::string_view::npos) return 0;
  std::string rest = suffix.substr(1);
  uint64_t base = 0;
  if (rest.empty() || rest == "b") base = 1000;
  if (rest == "ib" || rest == "i") base = 1024;
  uint64_t out = base;
  for (size_t i = 0; i < power; ++i) out *= base;
  return out;
}

// Three significant digits without trailing precision that nobody asked for: 1.50, 23.8, 512.
std::string three_digits(double value) {
  if (value < 9.995) return fmt::format("{:.2f}", value);
  if (value < 99.95) return fmt::format("{:.1f}", value);
  return fmt::format("{:.0f}", value);
}

constexpr std::array<std::string_view, 6> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};

}  // namespace

uint64_t parse_bytes(std::string_view text, std::string_view what) {
  std::string_view trimmed = trim(text);
  auto fail = [&](std::string_view why) {
    throw_error<ArgumentError>(
        "{} \"{}\" {}; expected a number of bytes such as 1073741824, 512MiB, 1.5GiB or 6GB", what,
        text, why);
  };
  if (trimmed.empty()) fail("is empty");
  if (trimmed.front() == '-') fail("is negative");
  if (!std::isdigit(static_cast<unsigned char>(trimmed.front())) && trimmed.front() != '.') {
    fail("is not a number");
  }
  size_t digits = 0;
  while (digits < trimmed.size() &&
         (std::isdigit(static_cast<unsigned char>(trimmed[digits])) || trimmed[digits] == '.')) {
    ++digits;
  }
  std::string_view number = trimmed.substr(0, digits);
  uint64_t factor = multiplier(lower(trim(trimmed.substr(digits))));
  if (factor == 0) fail("has an unknown unit");

  uint64_t whole = 0;
  auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), whole);
  if (error == std::errc() && end == number.data() + number.size()) {
    uint64_t bytes = 0;
    if (__builtin_mul_overflow(whole, factor, &bytes)) fail("is too large");
    return bytes;
  }
  long double value = 0;
  auto [fraction_end, fraction_error] =
      std::from_chars(number.data(), number.data() + number.size(), value);
  if (error == std::errc::result_out_of_range || fraction_error == std::errc::result_out_of_range) {
    fail("is too large");
  }
  if (fraction_error != std::errc() || fraction_end != number.data() + number.size()) {
    fail("is not a number");
  }
  value *= static_cast<long double>(factor);
  if (!(value < 18446744073709551615.0L)) fail("is too large");
  return static_cast<uint64_t>(value);
}

uint64_t parse_rate(std::string_view text, std::string_view what) {
  std::string_view trimmed = trim(text);
  std::string tail = lower(trimmed.substr(trimmed.size() - std::min<size_t>(trimmed.size(), 2)));
  if (tail == "/s") trimmed.remove_suffix(2);
  return parse_bytes(trimmed, what);
}

std::string format_bytes(uint64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1023.5 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{} {}", three_digits(value), kUnits[unit]);
}

std::string format_bytes_up(uint64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  // In integers: a double would round sizes above 2^53, some of them down.
  using Wide = unsigned __int128;
  for (size_t unit = 0;; ++unit) {
    auto scaled = [&](unsigned factor) {  // bytes * factor in this unit, rounded up
      return static_cast<uint64_t>((Wide{bytes} * factor + (Wide{1} << (10 * (unit + 1))) - 1) >>
                                   (10 * (unit + 1)));
    };
    if (uint64_t n = scaled(100); n < 1000)
      return fmt::format("{}.{:02} {}", n / 100, n % 100, kUnits[unit]);
    if (uint64_t n = scaled(10); n < 1000)
      return fmt::format("{}.{} {}", n / 10, n % 10, kUnits[unit]);
    if (uint64_t n = scaled(1); n < 1024) return fmt::format("{} {}", n, kUnits[unit]);
  }
}

std::string format_rate(double bytes_per_s) {
  constexpr std::array<std::string_view, 5> kUnits = {"B/s", "kB/s", "MB/s", "GB/s", "TB/s"};
  double value = std::max(0.0, bytes_per_s);
  size_t unit = 0;
  while (value >= 999.5 && unit + 1 < kUnits.size()) {
    value /= 1000;
    ++unit;
  }
  if (unit == 0) return fmt::format("{:.0f} B/s", value);
  return fmt::format("{} {}", three_digits(value), kUnits[unit]);
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds)) return "?";
  seconds = std::max(0.0, seconds);
  if (seconds < 0.9995e-3) return fmt::format("{:.0f} us", seconds * 1e6);
  if (seconds < 0.9995) return fmt::format("{:.0f} ms", seconds * 1e3);
  if (seconds < 59.95) return fmt::format("{} s", three_digits(seconds));
  auto whole = static_cast<uint64_t>(std::min(seconds + 0.5, 1e15));
  uint64_t hours = whole / 3600;
  if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, whole / 60 % 60, whole % 60);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

}  // namespace ferry
