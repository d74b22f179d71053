// Bytes, rates and durations as people write and read them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace ferry {

// "1024", "512MiB", "6GB", "1.5 GiB", "64k": a number, then B, K, M, G, T, P, E (or KB, MB, …:
// powers of 1000) or KiB, MiB, … (powers of 1024), in any case. A fraction of a byte is rounded
// down. Throws ArgumentError (`what` names the option in its text).
uint64_t parse_bytes(std::string_view text, std::string_view what = "size");

// "500MB/s", "2GiB/s" or plain bytes a second; "0" means no limit. Throws ArgumentError.
uint64_t parse_rate(std::string_view text, std::string_view what = "rate");

// "0 B", "1023 B", "1.50 KiB", "512 MiB", "23.8 GiB": three digits, powers of 1024.
std::string format_bytes(uint64_t bytes);

// As format_bytes(), rounded up in the last digit, for what is asked for ("at least 242 KiB"): what
// parse_bytes() makes of it is never less than `bytes`.
std::string format_bytes_up(uint64_t bytes);

// "1.24 GB/s": powers of 1000, as disks are sold.
std::string format_rate(double bytes_per_s);

// "12 us", "340 ms", "8.25 s", "2:05", "1:02:09".
std::string format_duration(double seconds);

inline namespace literals {
constexpr uint64_t operator""_KiB(unsigned long long n) {
  return n << 10;
}
constexpr uint64_t operator""_MiB(unsigned long long n) {
  return n << 20;
}
constexpr uint64_t operator""_GiB(unsigned long long n) {
  return n << 30;
}
}  // namespace literals

}  // namespace ferry
