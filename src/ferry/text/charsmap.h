// The precompiled character map of a sentencepiece model (normalizer "Precompiled").
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::text {

// A double-array trie from byte sequences to their replacements. Immutable.
class Charsmap {
 public:
  // `blob`: the trie's size in bytes (32 bits, little endian), the trie, the replacements, each
  // ended by NUL. Throws FormatError; every later access is checked against the blob's size.
  explicit Charsmap(std::string_view blob);

  // The replacement of the shortest prefix of `text` that the map knows, which is how the Rust
  // crate reads it: a grapheme that merely starts with a mapped character is replaced whole.
  std::optional<std::string_view> transform(std::string_view text) const;

 private:
  std::vector<uint32_t> trie_;
  std::string replacements_;
};

// Throws FormatError if `text` is not base64.
std::string decode_base64(std::string_view text);

}  // namespace ferry::text
