// Layerwise casting (diffusers' hooks/layerwise_casting.py): linear layers, convolutions and
// embeddings keep their weights in a narrow dtype and compute in a wide one.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <vector>

#include "ferry/nn/module.h"

namespace ferry::hooks {

// diffusers' DEFAULT_SKIP_MODULES_PATTERN.
extern const std::vector<std::string> kDefaultSkipModulesPattern;

struct LayerwiseCastingConfig {
  at::ScalarType storage_dtype = at::kFloat8_e4m3fn;
  // Of the rows of embeddings; other layers compute in the dtype of their input.
  at::ScalarType compute_dtype = at::kBFloat16;
  // Regular expressions (ECMAScript, searched for in the dotted name): modules that match stay as
  // they are, with all below them.
  std::vector<std::string> skip_modules_pattern = kDefaultSkipModulesPattern;
};

// Casts weights and biases of the layers of those kinds below `module`; a stub becomes one
// of the storage dtype, so that reading casts, and streaming moves the narrow weights. A quantized
// layer is left alone. There is no way back but loading anew. Returns how many layers were cast.
// Throws ArgumentError for a storage dtype that is no float8, a pattern that is no regular
// expression, and while offloading is enabled: casting comes first.
size_t apply_layerwise_casting(nn::Module& module, const LayerwiseCastingConfig& config = {});

}  // namespace ferry::hooks
