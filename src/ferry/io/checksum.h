// Checksums of bytes: a fast one against accidents, and SHA-256 to tell contents apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace ferry::io {

// XXH3, 64 bits: some 20 GB/s, finds torn and flipped bytes; no protection against forgery.
uint64_t checksum(std::span<const std::byte> bytes, uint64_t seed = 0);

// The same over bytes that come in parts.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;
  void update(std::span<const std::byte> bytes);
  uint64_t value() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// 64 hexadecimal digits.
std::string sha256_hex(std::span<const std::byte> bytes);

// 16 hexadecimal digits, and back. Throws FormatError for anything else.
std::string checksum_text(uint64_t checksum);
uint64_t parse_checksum(const std::string& text, const std::string& where);

}  // namespace ferry::io
