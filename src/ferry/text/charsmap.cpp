#include "ferry/text/charsmap.h"

#include "ferry/base/error.h"
#include "ferry/text/unicode.h"

namespace ferry::text {
namespace {

uint32_t little_endian_32(std::string_view bytes, size_t at) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) {
    value |= static_cast<uint32_t>(static_cast<uint8_t>(bytes[at + i])) << (8 * i);
  }
  return value;
}

// The fields of a darts-clone unit.
bool has_leaf(uint32_t unit) {
  return (unit >> 8 & 1) != 0;
}
uint32_t value(uint32_t unit) {
  return unit & 0x7FFFFFFF;
}
uint32_t label(uint32_t unit) {
  return unit & 0x800000FF;
}
uint32_t offset(uint32_t unit) {
  return (unit >> 10) << ((unit & (1u << 9)) >> 6);
}

}  // namespace

Charsmap::Charsmap(std::string_view blob) {
  if (blob.size() < 4) {
    throw_error<FormatError>("character map: {} bytes, expected a size of 4 bytes first",
                             blob.size());
  }
  const uint64_t trie_bytes = little_endian_32(blob, 0);
  if (trie_bytes == 0 || trie_bytes % 4 != 0 || trie_bytes > blob.size() - 4) {
    throw_error<FormatError>(
        "character map: the trie is said to have {} bytes; expected a multiple of 4 of at most {}",
        trie_bytes, blob.size() - 4);
  }
  trie_.resize(trie_bytes / 4);
  for (size_t i = 0; i < trie_.size(); ++i) trie_[i] = little_endian_32(blob, 4 + 4 * i);
  replacements_ = blob.substr(4 + trie_bytes);
  try {
    check_utf8(replacements_, "character map: replacements");
  } catch (const ArgumentError& e) {
    throw FormatError(e.what());
  }
}

std::optional<std::string_view> Charsmap::transform(std::string_view text) const {
  size_t node = offset(trie_[0]);
  for (const char byte : text) {
    const auto c = static_cast<uint8_t>(byte);
    if (c == 0) break;
    node ^= c;
    if (node >= trie_.size() || label(trie_[node]) != c) break;
    const uint32_t unit = trie_[node];
    node ^= offset(unit);
    if (!has_leaf(unit)) continue;
    if (node >= trie_.size()) break;
    const size_t begin = value(trie_[node]);
    if (begin > replacements_.size()) break;
    const size_t end = replacements_.find('\0', begin);
    const auto all = std::string_view(replacements_);
    return all.substr(begin, end == std::string::npos ? end : end - begin);
  }
  return std::nullopt;
}

std::string decode_base64(std::string_view text) {
  std::string out;
  out.reserve(text.size() / 4 * 3);
  while (!text.empty() && text.back() == '=') text.remove_suffix(1);
  uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    uint32_t digit = 0;
    if (c >= 'A' && c <= 'Z') {
      digit = static_cast<uint32_t>(c - 'A');
    } else if (c >= 'a' && c <= 'z') {
      digit = static_cast<uint32_t>(c - 'a') + 26;
    } else if (c >= '0' && c <= '9') {
      digit = static_cast<uint32_t>(c - '0') + 52;
    } else if (c == '+' || c == '/') {
      digit = c == '+' ? 62 : 63;
    } else {
      throw_error<FormatError>("base64: unexpected character 0x{:02x}", static_cast<uint8_t>(c));
    }
    bits = bits << 6 | digit;
    count += 6;
    if (count >= 8) {
      count -= 8;
      out += static_cast<char>(bits >> count & 0xFF);
    }
  }
  return out;
}

}  // namespace ferry::text
