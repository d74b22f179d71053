// Configurations of published components, for commands that work without their weights.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ferry/pipelines/plan_components.h"

namespace ferry::cli {

struct Preset {
  const char* name;
  const char* class_name;
  const char* config;
  uint64_t shard_bytes;  // 0: the library's default
};

// The configurations of the published components, and of small ones of the same kinds.
const std::vector<Preset>& presets();
// Null if there is none of this name.
const Preset* find_preset(const std::string& name);
// "a, b, c"
std::string preset_names();
// What `ferry plan --preset` plans ("flux-dev": with its text encoders and autoencoder; "t5-xxl"),
// in the order in which they run. Throws ArgumentError.
std::vector<pipelines::PlannedComponent> components_of_preset(
    const std::string& preset, const pipelines::PlanRequest& request);

}  // namespace ferry::cli
