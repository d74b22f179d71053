// Reading JSON that came from outside: every failure names the file and the key.
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::text {

// A value within a JSON file. Cheap to copy; keeps the document alive. All members throw
// FormatError ("file: key: got X, expected Y") where the value is not what is asked for.
class JsonView {
 public:
  // Reads and parses a file. IoError if it cannot be read.
  static JsonView parse_file(const std::filesystem::path& path);
  // `name` stands for the file in messages.
  static JsonView parse(std::string_view text, std::string name);

  JsonView at(std::string_view key) const;                      // must be there
  std::optional<JsonView> find(std::string_view key) const;     // nothing if missing or null
  std::vector<JsonView> elements() const;                       // of an array
  std::vector<std::pair<std::string, JsonView>> items() const;  // of an object

  bool is_string() const { return value_->is_string(); }
  bool is_array() const { return value_->is_array(); }
  bool is_object() const { return value_->is_object(); }
  bool is_bool() const { return value_->is_boolean(); }
  bool is_number() const { return value_->is_number(); }

  std::string string() const;
  bool boolean() const;
  double number() const;
  uint32_t id() const;  // a whole number below 2^31
  std::string string_or(std::string_view key, std::string fallback) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  // The one code point of a string.
  char32_t character() const;

  const nlohmann::json& raw() const { return *value_; }
  [[noreturn]] void fail(std::string_view problem) const;

 private:
  struct Document {
    std::string name;
    nlohmann::json root;
  };
  JsonView(std::shared_ptr<const Document> document, const nlohmann::json* value, std::string key)
      : document_(std::move(document)), value_(value), key_(std::move(key)) {}
  JsonView child(const nlohmann::json& value, std::string_view key) const;
  [[noreturn]] void fail_type(std::string_view expected) const;

  std::shared_ptr<const Document> document_;
  const nlohmann::json* value_;
  std::string key_;
};

}  // namespace ferry::text
