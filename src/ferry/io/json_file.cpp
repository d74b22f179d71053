#include "ferry/io/json_file.h"

#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/file.h"

namespace ferry::io {
namespace {

// nlohmann parses without recursion but copies and prints with it, so depth is refused up front.
void check_depth(std::string_view text, const std::string& where, int max_depth) {
  int depth = 0;
  size_t line = 1;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '\n') ++line;
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > max_depth) {
        throw_error<FormatError>("{}: line {}: JSON is nested deeper than {} levels", where, line,
                                 max_depth);
      }
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where,
                          const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    throw_error<FormatError>("{}: got {} of JSON, expected at most {}", where,
                             format_bytes(text.size()), format_bytes(limits.max_bytes));
  }
  check_depth(text, where, limits.max_depth);
  // The lexer takes a NUL for the end of the text and would not see what follows it.
  if (size_t nul = text.find('\0'); nul != std::string_view::npos) {
    throw_error<FormatError>("{}: broken JSON: a NUL byte at offset {}", where, nul);
  }
  try {
    return nlohmann::json::parse(text.begin(), text.end());
  } catch (const nlohmann::json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    std::string_view reason = error.what();
    if (size_t end = reason.find("] "); end != std::string_view::npos)
      reason.remove_prefix(end + 2);
    throw_error<FormatError>("{}: broken JSON: {}", where, reason);
  }
}

std::string read_text_file(const std::filesystem::path& path, uint64_t max_bytes) {
  std::shared_ptr<const File> file = File::open(path);
  if (file->size_bytes() > max_bytes) {
    throw_error<FormatError>("{}: got a file of {}, expected at most {}", path.string(),
                             format_bytes(file->size_bytes()), format_bytes(max_bytes));
  }
  std::string text(file->size_bytes(), '\0');
  file->read_exact(0, text.size(), reinterpret_cast<std::byte*>(text.data()));
  return text;
}

nlohmann::json read_json_file(const std::filesystem::path& path, const JsonLimits& limits) {
  return parse_json(read_text_file(path, limits.max_bytes), path.string(), limits);
}

nlohmann::json read_json_object(const std::filesystem::path& path, const JsonLimits& limits) {
  nlohmann::json value = read_json_file(path, limits);
  if (!value.is_object()) {
    throw_error<FormatError>("{}: got a JSON {}, expected an object", path.string(),
                             value.type_name());
  }
  return value;
}

}  // namespace ferry::io
