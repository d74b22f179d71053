// Tokenizing a file of texts, for comparing with other libraries.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace ferry::text {

// Each line of `input` is a JSON string; each line of `output` the JSON list of its ids, special
// tokens added, not padded, cut only where `max_length` is given. `dir`: the tokenizer's folder.
// Appears whole or not at all. Throws IoError, FormatError (naming the line).
void tokenize_file(const std::filesystem::path& dir, const std::filesystem::path& input,
                   const std::filesystem::path& output,
                   std::optional<int64_t> max_length = std::nullopt);

}  // namespace ferry::text
