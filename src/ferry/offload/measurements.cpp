#include "ferry/offload/measurements.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include <algorithm>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/json_file.h"
#include "ferry/io/scratch_file.h"

namespace ferry::offload {

namespace {

constexpr int kVersion = 1;

std::string entry_name(const MeasurementKey& key) {
  return fmt::format("{} {} {}x{} text {} batch {} threads {}{}", key.device, key.dtype, key.width,
                     key.height, key.text_tokens, key.batch, key.threads,
                     key.tiled ? " tiled" : "");
}

// The entries of a file, or an empty object.
nlohmann::json read_entries(const std::filesystem::path& file) {
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored)) return nlohmann::json::object();
  try {
    nlohmann::json json = io::read_json_object(file);
    if (json.value("version", 0) == kVersion && json.contains("entries") &&
        json["entries"].is_object())
      return json["entries"];
    log::debug("{}: not a file of measurements of this version; ignored", file.string());
  } catch (const std::exception& error) {
    log::debug("{}: ignored: {}", file.string(), error.what());
  }
  return nlohmann::json::object();
}

std::optional<Measurement> parse(const nlohmann::json& entry) {
  if (!entry.is_object() || !entry.contains("activation_bytes") ||
      !entry["activation_bytes"].is_number_unsigned())
    return std::nullopt;
  Measurement measurement;
  measurement.activation_bytes = entry["activation_bytes"].get<uint64_t>();
  if (entry.contains("compute_s") && entry["compute_s"].is_object()) {
    for (const auto& [name, seconds] : entry["compute_s"].items()) {
      if (seconds.is_number() && seconds.get<double>() >= 0)
        measurement.compute_s[name] = seconds.get<double>();
    }
  }
  if (entry.contains("read_bytes_per_s") && entry["read_bytes_per_s"].is_number())
    measurement.read_bytes_per_s = std::max(0.0, entry["read_bytes_per_s"].get<double>());
  return measurement;
}

}  // namespace

std::filesystem::path Measurements::default_folder() {
  return io::cache_folder() / "measurements";
}

std::filesystem::path Measurements::file_of(const MeasurementKey& key) const {
  const bool plain = !key.component.empty() && key.component.front() != '.' &&
                     std::all_of(key.component.begin(), key.component.end(), [](unsigned char c) {
                       return std::isalnum(c) || c == '-' || c == '_' || c == '.';
                     });
  if (!plain) {
    throw_error<ArgumentError>(
        "measurements: the component '{}' is no fingerprint; expected letters, digits, '-', '_', "
        "'.'",
        key.component);
  }
  return folder_ / (key.component + ".json");
}

std::optional<Measurement> Measurements::find(const MeasurementKey& key) const {
  const nlohmann::json entries = read_entries(file_of(key));
  const auto entry = entries.find(entry_name(key));
  return entry == entries.end() ? std::nullopt : parse(*entry);
}

void Measurements::store(const MeasurementKey& key, const Measurement& measurement) const {
  const std::filesystem::path file = file_of(key);
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  if (error)
    throw_error<IoError>("{}: cannot create the folder: {}", folder_.string(), error.message());
  nlohmann::json entries = read_entries(file);
  uint64_t activation_bytes = measurement.activation_bytes;
  double read_bytes_per_s = measurement.read_bytes_per_s;
  if (entries.contains(entry_name(key))) {
    if (auto old = parse(entries[entry_name(key)])) {
      activation_bytes = std::max(activation_bytes, old->activation_bytes);
      if (read_bytes_per_s == 0) read_bytes_per_s = old->read_bytes_per_s;
    }
  }
  entries[entry_name(key)] = {{"activation_bytes", activation_bytes},
                              {"compute_s", measurement.compute_s},
                              {"read_bytes_per_s", read_bytes_per_s}};
  io::write_file(file, nlohmann::json{{"version", kVersion}, {"entries", entries}}.dump(1) + "\n");
}

std::vector<GroupCost> with_measured_times(std::vector<GroupCost> groups,
                                           const std::map<std::string, double>& compute_s) {
  double estimated = 0, measured = 0;
  for (const GroupCost& group : groups) {
    const auto found = compute_s.find(group.name);
    if (found == compute_s.end()) continue;
    estimated += group.compute_s;
    measured += found->second;
  }
  const double scale = estimated > 0 && measured > 0 ? measured / estimated : 1;
  for (GroupCost& group : groups) {
    const auto found = compute_s.find(group.name);
    group.compute_s = found == compute_s.end() ? group.compute_s * scale : found->second;
  }
  return groups;
}

}  // namespace ferry::offload
