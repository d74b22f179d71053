// What a caller in Python does before a forward in another dtype than its inputs'.
#pragma once

#include <ATen/core/Tensor.h>

#include "ferry/models/model.h"

namespace ferry::models {

// Floating-point inputs follow the model's dtype; positions (…_ids), timesteps and guidance stay
// exact, the models cast those themselves.
inline void cast_inputs(NamedTensors& inputs, at::ScalarType dtype) {
  for (auto& [name, tensor] : inputs) {
    if (!at::isFloatingType(tensor.scalar_type()) || tensor.scalar_type() == dtype) continue;
    if (name.ends_with("_ids") || name == "timestep" || name == "guidance") continue;
    tensor = tensor.to(dtype);
  }
}

}  // namespace ferry::models
