// Config structs: one `fields(visitor)` lists the members, and JSON is derived from it both ways.
//
//   struct FluxTransformer2DConfig : ConfigBase {
//     int64_t patch_size = 1;
//     std::optional<int64_t> out_channels;                      // null in JSON
//     template <class V> void fields(V& v) {
//       v("patch_size", patch_size);
//       v("out_channels", out_channels);
//     }
//   };
//
// Keys that a struct does not know (class version, `_name_or_path`, keys of a newer diffusers) are
// kept and written back, and all keys stay in the order in which they were read.
#pragma once

#include <nlohmann/json.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "ferry/base/error.h"

namespace ferry::models {

struct ConfigBase {
  // What was read: the order of the keys, and those that the struct does not know. The values of
  // the others are the members'.
  nlohmann::ordered_json source = nlohmann::ordered_json::object();
};

// The outermost object of a config file, in its order. Throws IoError, FormatError.
nlohmann::ordered_json read_config(const std::filesystem::path& path);
// Indented as Python writes it; appears whole or not at all. Throws IoError.
void write_config(const std::filesystem::path& path, const nlohmann::ordered_json& config);

// ---- sizes ----

// What no model comes near, and what keeps products of a few sizes within 64 bits: a damaged config
// is an error, not hours of work or an enormous allocation.
constexpr int64_t kMostLayers = 512;
constexpr int64_t kMostChannels = int64_t{1} << 20;
constexpr int64_t kMostTokens = int64_t{1} << 24;  // of a vocabulary

// Throws ArgumentError "<class_name>: <key>: got <value>, expected <least> to <most>".
void check_size(const std::string& class_name, const char* key, int64_t value, int64_t least = 1,
                int64_t most = kMostChannels);

// ---- implementation ----

namespace detail {

// nlohmann converts between numbers silently (2.7 to 2, true to 1, 2^64 - 1 to -1): integers are
// taken only where nothing is lost. Throws FormatError without a place.
int64_t get_integer(const nlohmann::ordered_json& json);

template <class T>
void get_value(const nlohmann::ordered_json& json, std::optional<T>& value);
template <class T>
void get_value(const nlohmann::ordered_json& json, std::vector<T>& value);
template <class T>
void get_value(const nlohmann::ordered_json& json, T& value) {
  if constexpr (std::is_same_v<T, int64_t>) {
    value = get_integer(json);
  } else {
    value = json.get<T>();
  }
}
template <class T>
void get_value(const nlohmann::ordered_json& json, std::optional<T>& value) {
  if (json.is_null()) {
    value.reset();
  } else {
    get_value(json, value.emplace());
  }
}
template <class T>
void get_value(const nlohmann::ordered_json& json, std::vector<T>& value) {
  if (!json.is_array()) throw_error<FormatError>("expected a list, got {}", json.type_name());
  std::vector<T> values(json.size());
  for (size_t i = 0; i < json.size(); ++i) get_value(json[i], values[i]);
  value = std::move(values);
}
template <class T>
nlohmann::ordered_json put_value(const T& value) {
  return value;
}
template <class T>
nlohmann::ordered_json put_value(const std::optional<T>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

// What went wrong at a key, without nlohmann's "[json.exception.type_error.302] ".
[[noreturn]] void fail_at_key(const std::string& where, const char* key,
                              const nlohmann::ordered_json& value, const std::string& reason);

struct Reader {
  const nlohmann::ordered_json& json;
  const std::string& where;
  template <class T>
  void operator()(const char* key, T& value) {
    auto it = json.find(key);
    if (it == json.end()) return;
    try {
      get_value(*it, value);
    } catch (const nlohmann::json::exception& error) {
      fail_at_key(where, key, *it, error.what());
    } catch (const FormatError& error) {
      fail_at_key(where, key, *it, error.what());
    }
  }
};

struct Writer {
  nlohmann::ordered_json& json;
  template <class T>
  void operator()(const char* key, const T& value) {
    json[key] = put_value(value);
  }
};

}  // namespace detail

// Absent keys keep their defaults. Throws FormatError naming `where` (the file) and the key.
template <class Config>
Config config_from_json(const nlohmann::ordered_json& json, const std::string& where) {
  if (!json.is_object())
    throw_error<FormatError>("{}: expected a JSON object, got {}", where, json.type_name());
  Config config;
  config.source = json;
  detail::Reader reader{config.source, where};
  config.fields(reader);
  return config;
}

// One value of a config; `fallback` where it is absent or null. Throws FormatError for another
// type.
template <class T>
T config_value(const nlohmann::ordered_json& config, const char* key, T fallback,
               const std::string& where) {
  std::optional<T> value = fallback;
  detail::Reader{config, where}(key, value);
  return value.value_or(fallback);
}

template <class Config>
nlohmann::ordered_json config_to_json(const Config& config) {
  nlohmann::ordered_json json = config.source;
  detail::Writer writer{json};
  const_cast<Config&>(config).fields(writer);
  return json;
}

}  // namespace ferry::models
