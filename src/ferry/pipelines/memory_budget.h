// One budget for everything a generation holds where compute happens: the program, activations, and
// what is left for weights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "ferry/models/costs.h"
#include "ferry/pipelines/pipeline.h"

namespace ferry::pipelines {

// What decides how much memory activations take.
struct GenerationSize {
  int64_t width = 0, height = 0;  // pixels; 0: what the model was trained on
  int64_t batch = 1;              // pictures
  int64_t prompts = 1;            // texts that are encoded at once
  int64_t text_tokens = 512;
  bool true_cfg = false;  // two predictions a step
  int64_t vae_scale_factor = 8;

  bool operator==(const GenerationSize&) const = default;
};
// Of a call with these arguments.
GenerationSize generation_size(const DiffusionPipeline& pipeline,
                               const TextToImageArguments& arguments);

// One run of the model for a generation of this size, without true CFG and tiles.
models::Workload workload_of(const models::Model& model, const GenerationSize& size,
                             at::Device device);

struct MemorySplit {
  uint64_t total_bytes = 0;
  uint64_t reserve_bytes = 0;     // for the application
  uint64_t program_bytes = 0;     // what is there before the weights: code, libraries, context
  uint64_t activation_bytes = 0;  // of the component that needs most; estimated (models/costs.h)
  std::string largest;            // that component
  uint64_t weights_bytes = 0;     // what is left, for Engine's budget
  uint64_t all_weights_bytes = 0;
  // What was chosen to make it fit.
  bool slice_vae = false;         // decode one picture after the other
  bool tile_vae = false;          // and each in tiles
  int64_t pictures_per_pass = 0;  // of the denoiser; 0: the whole batch
  hooks::LockstepTurn lockstep_turn = hooks::LockstepTurn::group;
  uint64_t arena_bytes = 0;  // that lockstep by blocks wants; 0: the engine's own choice

  bool all_fit() const { return weights_bytes >= all_weights_bytes; }
  // "6 GiB: 0.3 for the program, 1.2 for activations (vae, in tiles), 4.5 for weights of 23.8"
  std::string describe() const;
};

// What a user asks for: `--memory` and its relatives.
struct MemoryRequest {
  // All that may be held where compute happens. Unset: what is free.
  std::optional<uint64_t> memory_bytes = {};
  // Of it, what the application keeps for itself.
  uint64_t reserve_bytes = 0;
  // What the process holds without the weights. Unset: what it holds now, or the context that a
  // device's runtime takes.
  std::optional<uint64_t> program_bytes = {};
  // That weights get at least, or all they need.
  uint64_t least_weights_bytes = 64 << 20;
};

// Splits request.memory_bytes for a generation of this size on `device`. Where activations are too
// many, the component that needs most makes do with less, until they fit: pictures are decoded one
// after the other, then in tiles; the denoiser's batch is split into passes. Reads no weight.
// Throws BudgetError stating the least total that would do. REQUIRES: request.memory_bytes.
MemorySplit split_memory(const DiffusionPipeline& pipeline, const GenerationSize& size,
                         at::Device device, const MemoryRequest& request);

// What may be used of what is free now, leaving a tenth, 512 MiB at least, to others: RAM within
// this process's cgroup for the CPU, free device memory otherwise. What this process holds already
// counts as usable.
struct FreeMemory {
  uint64_t usable_bytes = 0;
  uint64_t headroom_bytes = 0;
};
FreeMemory usable_memory(at::Device device);

// "6GiB", or "auto" for what is free. Throws ArgumentError naming `what`.
std::optional<uint64_t> parse_memory(const std::string& text, std::string_view what);

struct MemoryChoice {
  MemorySplit split;
  std::optional<uint64_t> headroom_bytes;  // left to other programs, where what is free was taken

  // Weights that stay as they are, or the budget under which they are streamed.
  std::optional<uint64_t> weights_memory_bytes() const {
    return split.all_fit() ? std::nullopt : std::optional(split.weights_bytes);
  }
  std::string describe() const;
};

// split_memory() for what was asked. Throws BudgetError, also for a reserve that leaves nothing.
MemoryChoice choose_memory(const DiffusionPipeline& pipeline, const GenerationSize& size,
                           at::Device device, const MemoryRequest& request);
// Sets the pipeline up accordingly: the autoencoder's slicing and tiling, the denoiser's passes,
// and where the weights are: resident on `engine.device`, or streamed through an engine with these
// options. One that the pipeline has already keeps streaming, under the new budget. What splits the
// batch is logged.
void apply_memory(DiffusionPipeline& pipeline, const MemoryChoice& choice,
                  offload::EngineOptions engine);

}  // namespace ferry::pipelines
