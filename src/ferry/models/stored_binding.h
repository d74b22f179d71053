// From what a checkpoint holds to a model's slots, quantized weights included.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ferry/models/model.h"
#include "ferry/quant/stored_weights.h"
#include "ferry/weights/binding.h"

namespace ferry::models {

// Tells each linear layer of `model` how its weight is stored, and binds all slots (weights::bind).
// Names are mapped by options.map_key; components keep their dtype whatever options.dtype says. A
// quantized weight that is no linear layer's (a table in a GGUF file) is dequantized as it is read,
// to the dtype that options.dtype gives for float32, else to bfloat16. `model` must not have been
// bound before. Throws FormatError: as weights::bind(), and for a quantized weight of another shape
// than its layer's, or of several components where there is no linear layer.
std::shared_ptr<weights::Binding> bind_stored(Model& model, quant::StoredWeights stored,
                                              std::map<std::string, std::string> metadata,
                                              std::vector<std::shared_ptr<const io::File>> files,
                                              const weights::BindOptions& options);

// The same of a whole checkpoint of the model's own names: finds its format, and casts to `dtype`,
// if given, what is plain and not kept in float32.
std::shared_ptr<weights::Binding> bind_checkpoint(
    Model& model, std::shared_ptr<const weights::Checkpoint> checkpoint,
    std::optional<at::ScalarType> dtype);

}  // namespace ferry::models
