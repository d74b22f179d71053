#include "ferry/text/byte_level.h"

#include <array>

namespace ferry::text {
namespace {

struct Alphabet {
  std::array<char32_t, 256> characters{};
  std::array<int16_t, 512> bytes{};

  Alphabet() {
    bytes.fill(-1);
    char32_t next = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
      characters[byte] = printable ? byte : next++;
      bytes[characters[byte]] = static_cast<int16_t>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

char32_t byte_to_character(uint8_t byte) {
  return alphabet().characters[byte];
}

void map_bytes_to_characters(Piece& piece) {
  std::vector<Change> changes;
  changes.reserve(piece.text().size());
  for (const char byte : piece.text()) {
    const auto b = static_cast<uint8_t>(byte);
    const bool continues = (b & 0xC0) == 0x80;
    changes.push_back({byte_to_character(b), continues ? 1 : 0});
  }
  piece.transform(changes);
}

std::optional<std::string> characters_to_bytes(std::string_view token) {
  std::string out;
  for (size_t at = 0; at < token.size();) {
    const char32_t c = next_code_point(token, at);
    if (c >= alphabet().bytes.size() || alphabet().bytes[c] < 0) return std::nullopt;
    out += static_cast<char>(alphabet().bytes[c]);
  }
  return out;
}

}  // namespace ferry::text
