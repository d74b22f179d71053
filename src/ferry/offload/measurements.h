// What earlier runs measured, so that the next plan starts from it and not from estimates.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ferry/offload/plan.h"

namespace ferry::offload {

// Under what a measurement holds.
struct MeasurementKey {
  std::string component;  // a fingerprint of the weights: letters, digits, '-', '_', '.'
  std::string device;     // "cpu", "cuda:NVIDIA GeForce RTX 4060"
  std::string dtype;      // of activations
  int64_t width = 0, height = 0, text_tokens = 0, batch = 1;
  int threads = 0;  // compute threads on a CPU, else 0
  bool tiled = false;
};

struct Measurement {
  uint64_t activation_bytes = 0;            // the most at once, with workspaces
  std::map<std::string, double> compute_s;  // by group name
  // With which the weights came from disk while there were any to read; 0: not seen.
  double read_bytes_per_s = 0;
};

// One JSON file a component, in a folder of the cache. A file that cannot be read or is not one of
// these counts as absent. Two processes that store at once: the last one wins, no file is torn.
class Measurements {
 public:
  explicit Measurements(std::filesystem::path folder) : folder_(std::move(folder)) {}
  // In io::cache_folder().
  static std::filesystem::path default_folder();

  std::optional<Measurement> find(const MeasurementKey& key) const;
  // Keeps the larger activation peak of the old and the new, the new times, and the old read rate
  // where the new one is 0. Throws IoError;
  // ArgumentError for a component that is no file name.
  void store(const MeasurementKey& key, const Measurement& measurement) const;

 private:
  std::filesystem::path file_of(const MeasurementKey& key) const;
  std::filesystem::path folder_;
};

// The groups with measured times in place of estimated ones. Groups that were not measured keep
// their estimate, scaled as the measured ones turned out together.
std::vector<GroupCost> with_measured_times(std::vector<GroupCost> groups,
                                           const std::map<std::string, double>& compute_s);

}  // namespace ferry::offload
