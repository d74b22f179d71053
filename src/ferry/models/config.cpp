#include "ferry/models/config.h"

#include "ferry/io/atomic_file.h"
#include "ferry/io/json_file.h"

namespace ferry::models {

nlohmann::ordered_json read_config(const std::filesystem::path& path) {
  std::string text = io::read_text_file(path);
  // First with the limits and messages of files from outside; that parser sorts the keys.
  nlohmann::json checked = io::parse_json(text, path.string());
  if (!checked.is_object()) {
    throw_error<FormatError>("{}: got a JSON {}, expected an object", path.string(),
                             checked.type_name());
  }
  return nlohmann::ordered_json::parse(text);
}

void write_config(const std::filesystem::path& path, const nlohmann::ordered_json& config) {
  io::write_file(path, std::string_view(config.dump(2) + "\n"));
}

void check_size(const std::string& class_name, const char* key, int64_t value, int64_t least,
                int64_t most) {
  if (value >= least && value <= most) return;
  throw_error<ArgumentError>("{}: {}: got {}, expected {} to {}", class_name, key, value, least,
                             most);
}

namespace detail {

int64_t get_integer(const nlohmann::ordered_json& json) {
  if (json.is_number_unsigned() && json.get<uint64_t>() <= uint64_t{INT64_MAX})
    return static_cast<int64_t>(json.get<uint64_t>());
  if (json.is_number_integer() && !json.is_number_unsigned()) return json.get<int64_t>();
  // Some configs carry 128.0 where a whole number is meant.
  if (json.is_number_float()) {
    constexpr double kExact = 9007199254740992;  // 2^53: beyond, whole numbers have gaps
    double number = json.get<double>();
    if (number >= -kExact && number <= kExact &&
        number == static_cast<double>(static_cast<int64_t>(number)))
      return static_cast<int64_t>(number);
  }
  throw_error<FormatError>("expected a whole number of at most 63 bits, got {}", json.type_name());
}

void fail_at_key(const std::string& where, const char* key, const nlohmann::ordered_json& value,
                 const std::string& reason) {
  std::string_view text = reason;
  if (text.starts_with("[json.exception")) {
    if (size_t end = text.find("] "); end != std::string_view::npos) text.remove_prefix(end + 2);
  }
  std::string got = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (got.size() > 100) got = got.substr(0, 100) + "…";
  throw_error<FormatError>("{}: key \"{}\": got {}: {}", where, key, got, text);
}

}  // namespace detail

}  // namespace ferry::models
