// GPT-2's reversible map of bytes to printable characters, used by byte-level BPE.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "ferry/text/piece.h"

namespace ferry::text {

// The character that stands for a byte: itself if printable in Latin-1, else one from U+0100 on.
char32_t byte_to_character(uint8_t byte);
// Each byte of the piece becomes its character.
void map_bytes_to_characters(Piece& piece);
// The bytes that the characters of a token stand for; nothing if one is not in the alphabet.
std::optional<std::string> characters_to_bytes(std::string_view token);

}  // namespace ferry::text
