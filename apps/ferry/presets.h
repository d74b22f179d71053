// Configurations of published components, for commands that work without their weights.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

}  // namespace ferry::cli
