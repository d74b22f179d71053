// What a run of a model costs beside its weights: operations, layer by layer, and memory for
// activations. For planning, also of models whose weights are not here. Thread-safe.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "ferry/models/model.h"

namespace ferry::models {

// One run: a forward, or of an autoencoder a decode.
struct Workload {
  int64_t height = 1024, width = 1024;  // of the picture, in pixels
  int64_t batch = 1;
  int64_t text_tokens = 512;
  at::ScalarType dtype = at::kBFloat16;  // of activations
  // A CPU rotates queries and keys in one pass; a device makes float32 copies of them.
  bool on_cpu = false;
  // An autoencoder that decodes in tiles, with its own tile size and overlap.
  bool tiled = false;
  // Pixels that a latent covers in each direction.
  int64_t vae_scale_factor = 8;
};

// Rows that a layer's weight is multiplied with; attention products of what it follows.
struct LayerLoad {
  double rows = 0;
  double attention_flops = 0;
};

// What Model::costs() answers for one workload.
struct Costs {
  // By the dotted name of the module that holds the weights; nothing for what the run does not use.
  std::function<LayerLoad(const std::string& layer)> load;
  // The most numbers of the activations' dtype that are alive at once, by counting in the forward.
  double values = 0;
  // Of these, while a run waits between two of its blocks; nothing: all.
  std::optional<double> held_values = {};
};

// Of a model that patches latents 2 x 2.
int64_t image_tokens(const Workload& workload);

// Floating-point operations (a multiplication and an addition are two) by the dotted name of the
// module that holds the weights; attention products count with the layer that follows them. What a
// run does not use has none.
std::map<std::string, double> layer_flops(const Model& model, const Workload& workload);

// An estimate, from above, of the most bytes that activations take at once, inputs and outputs
// included; workspaces of kernels that do not come from torch's allocator are not.
// tests/models/costs_test.cpp compares it with what the allocator counts: 1 to 1.6 times as much.
uint64_t activation_bytes(const Model& model, const Workload& workload);

// Of these, what a run holds while it waits between two of its blocks (hooks/lockstep.h), likewise
// from above.
uint64_t held_bytes(const Model& model, const Workload& workload);

}  // namespace ferry::models
