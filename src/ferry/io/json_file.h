// JSON files from outside: configs, indexes, tokenizers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace ferry::io {

struct JsonLimits {
  uint64_t max_bytes = 256ull << 20;  // the largest tokenizer.json known is 35 MB
  // Nested arrays and objects; deeper ones would overflow the stack of whoever walks them.
  int max_depth = 64;
};

// Throws FormatError naming `where` with line and column.
nlohmann::json parse_json(std::string_view text, const std::string& where,
                          const JsonLimits& limits = {});

// Throws IoError if the file cannot be read, FormatError if it is too large or no JSON.
nlohmann::json read_json_file(const std::filesystem::path& path, const JsonLimits& limits = {});

// The same, and FormatError unless the outermost value is an object.
nlohmann::json read_json_object(const std::filesystem::path& path, const JsonLimits& limits = {});

// The bytes of a small file. Throws IoError, FormatError above `max_bytes`.
std::string read_text_file(const std::filesystem::path& path, uint64_t max_bytes = 256ull << 20);

}  // namespace ferry::io
