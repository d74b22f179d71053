// How a model's slots are bound to a checkpoint: names, dtypes, what may be missing.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "ferry/models/model.h"
#include "ferry/weights/binding.h"

namespace ferry::models {

// Whether one of the parts of a dotted name is among `parts`.
bool has_part(const std::string& name, const std::vector<std::string>& parts);

// map_key and tied keys are the model's. With `dtype`, floating-point slots get it, but those that
// the model keeps in float32 (diffusers' _keep_in_fp32_modules). The model must outlive the
// options.
weights::BindOptions bind_options(const Model& model, std::optional<at::ScalarType> dtype);

}  // namespace ferry::models
