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
// kept in `extra` and written back.
#pragma once

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <vector>

#include "ferry/base/error.h"

namespace ferry::models {

struct ConfigBase {
  // Ordered, so that a file is written back in the order it came in.
  nlohmann::ordered_json extra = nlohmann::ordered_json::object();
};

namespace detail {

template <class T>
void get_value(const nlohmann::ordered_json& json, T& value) {
  value = json.get<T>();
}
template <class T>
void get_value(const nlohmann::ordered_json& json, std::optional<T>& value) {
  if (json.is_null()) {
    value.reset();
  } else {
    value = json.get<T>();
  }
}
template <class T>
nlohmann::ordered_json put_value(const T& value) {
  return value;
}
template <class T>
nlohmann::ordered_json put_value(const std::optional<T>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

struct Reader {
  nlohmann::ordered_json& json;  // fields are erased as they are read; the rest is `extra`
  const std::string& where;
  template <class T>
  void operator()(const char* key, T& value) {
    auto it = json.find(key);
    if (it == json.end()) return;
    try {
      get_value(*it, value);
    } catch (const nlohmann::json::exception& error) {
      throw_error<FormatError>("{}: key \"{}\": got {}: {}", where, key, it->dump(), error.what());
    }
    json.erase(key);
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
  config.extra = json;
  detail::Reader reader{config.extra, where};
  config.fields(reader);
  return config;
}

template <class Config>
nlohmann::ordered_json config_to_json(const Config& config) {
  nlohmann::ordered_json json = config.extra;
  detail::Writer writer{json};
  const_cast<Config&>(config).fields(writer);
  return json;
}

}  // namespace ferry::models
