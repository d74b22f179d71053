#include "ferry/text/json_view.h"

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/text/unicode.h"

namespace ferry::text {
JsonView JsonView::parse_file(const std::filesystem::path& path) {
  return parse(io::read_text_file(path), path.string());
}

JsonView JsonView::parse(std::string_view text, std::string name) {
  auto document = std::make_shared<Document>();
  document->root = io::parse_json(text, name);
  document->name = std::move(name);
  const nlohmann::json* root = &document->root;
  return JsonView(std::move(document), root, "");
}

void JsonView::fail(std::string_view problem) const {
  throw_error<FormatError>("{}: {}: {}", document_->name, key_.empty() ? "top level" : key_,
                           problem);
}

void JsonView::fail_type(std::string_view expected) const {
  std::string shown = value_->type_name();
  if (value_->is_primitive()) {
    shown = value_->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    if (shown.size() > 60) shown = fmt::format("a string of {} bytes", shown.size() - 2);
  }
  fail(fmt::format("got {}, expected {}", shown, expected));
}

JsonView JsonView::child(const nlohmann::json& value, std::string_view key) const {
  return JsonView(document_, &value,
                  key_.empty() ? std::string(key) : fmt::format("{}.{}", key_, key));
}

JsonView JsonView::at(std::string_view key) const {
  if (!value_->is_object()) fail_type("an object");
  const auto found = value_->find(key);
  if (found == value_->end()) fail(fmt::format("the key '{}' is missing", key));
  return child(*found, key);
}

std::optional<JsonView> JsonView::find(std::string_view key) const {
  if (!value_->is_object()) fail_type("an object");
  const auto found = value_->find(key);
  if (found == value_->end() || found->is_null()) return std::nullopt;
  return child(*found, key);
}

std::vector<JsonView> JsonView::elements() const {
  if (!value_->is_array()) fail_type("a list");
  std::vector<JsonView> out;
  out.reserve(value_->size());
  for (size_t i = 0; i < value_->size(); ++i)
    out.push_back(child((*value_)[i], fmt::format("{}", i)));
  return out;
}

std::vector<std::pair<std::string, JsonView>> JsonView::items() const {
  if (!value_->is_object()) fail_type("an object");
  std::vector<std::pair<std::string, JsonView>> out;
  out.reserve(value_->size());
  for (const auto& [key, value] : value_->items()) out.emplace_back(key, child(value, key));
  return out;
}

std::string JsonView::string() const {
  if (!value_->is_string()) fail_type("a string");
  return value_->get<std::string>();
}

bool JsonView::boolean() const {
  if (!value_->is_boolean()) fail_type("true or false");
  return value_->get<bool>();
}

double JsonView::number() const {
  if (!value_->is_number()) fail_type("a number");
  return value_->get<double>();
}

uint32_t JsonView::id() const {
  if (!value_->is_number_unsigned() || value_->get<uint64_t>() > INT32_MAX) {
    fail_type("a whole number from 0 to 2147483647");
  }
  return value_->get<uint32_t>();
}

std::string JsonView::string_or(std::string_view key, std::string fallback) const {
  const auto value = find(key);
  return value ? value->string() : fallback;
}

bool JsonView::boolean_or(std::string_view key, bool fallback) const {
  const auto value = find(key);
  return value ? value->boolean() : fallback;
}

char32_t JsonView::character() const {
  const std::string text = string();
  size_t at = 0;
  const char32_t c = text.empty() ? 0 : next_code_point(text, at);
  if (text.empty() || at != text.size()) fail_type("one character");
  return c;
}

}  // namespace ferry::text
