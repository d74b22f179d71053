#include "ferry/io/checksum.h"

#include <openssl/evp.h>

#include <charconv>

#include "ferry/base/error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ferry::io {

uint64_t checksum(std::span<const std::byte> bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

// XXH3's state wants 64-byte alignment, which new gives to an over-aligned type.
struct Checksum::State {
  XXH3_state_t xxh;
};

Checksum::Checksum() : state_(new State) {
  XXH3_64bits_reset(&state_->xxh);
}

Checksum::~Checksum() = default;

void Checksum::update(std::span<const std::byte> bytes) {
  XXH3_64bits_update(&state_->xxh, bytes.data(), bytes.size());
}

uint64_t Checksum::value() const {
  return XXH3_64bits_digest(&state_->xxh);
}

std::string sha256_hex(std::span<const std::byte> bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr) != 1)
    throw_error<Error>("SHA-256 is not available in this libcrypto");
  std::string text;
  for (unsigned int i = 0; i < size; ++i) text += fmt::format("{:02x}", digest[i]);
  return text;
}

std::string checksum_text(uint64_t checksum) {
  return fmt::format("{:016x}", checksum);
}

uint64_t parse_checksum(const std::string& text, const std::string& where) {
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (text.size() != 16 || error != std::errc() || end != text.data() + text.size()) {
    throw_error<FormatError>("{}: checksum \"{}\": expected 16 hexadecimal digits", where, text);
  }
  return value;
}

}  // namespace ferry::io
