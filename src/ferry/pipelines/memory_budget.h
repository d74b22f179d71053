// One budget for everything a generation holds where compute happens: the program, activations, and
// what is left for weights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "ferry/pipelines/pipeline.h"

namespace ferry::pipelines {

// What decides how much memory activations take.
struct GenerationSize {
  int64_t width = 0, height = 0;  // pixels; 0: what the model was trained on
  int64_t batch = 1;              // pictures
  int64_t text_tokens = 512;
  bool true_cfg = false;  // two predictions at once
};

struct MemorySplit {
  uint64_t total_bytes = 0;
  uint64_t program_bytes = 0;     // what is there before the weights: code, libraries, context
  uint64_t activation_bytes = 0;  // of the component that needs most; estimated (models/costs.h)
  std::string largest;            // that component
  uint64_t weights_bytes = 0;     // what is left, for Engine's budget
  uint64_t all_weights_bytes = 0;
  bool tile_vae = false;  // the decode would not fit otherwise

  bool all_fit() const { return weights_bytes >= all_weights_bytes; }
  // "6 GiB: 0.3 for the program, 1.2 for activations (vae, in tiles), 4.5 for weights of 23.8"
  std::string describe() const;
};

// Splits `total_bytes` for a generation of this size on `device`. Reads no weight. Throws
// BudgetError stating the least total with which the weights still have `least_weights_bytes`.
MemorySplit split_memory(const DiffusionPipeline& pipeline, const GenerationSize& size,
                         uint64_t total_bytes, at::Device device,
                         uint64_t least_weights_bytes = 64 << 20);

// What may be used of what is free now, leaving a tenth, 512 MiB at least, to others: RAM within
// this process's cgroup for the CPU, free device memory otherwise. What this process holds already
// counts as usable.
struct FreeMemory {
  uint64_t usable_bytes = 0;
  uint64_t headroom_bytes = 0;
};
FreeMemory usable_memory(at::Device device);

}  // namespace ferry::pipelines
