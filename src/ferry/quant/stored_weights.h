// What a checkpoint holds, as parameters: plain tensors, and quantized weights with their
// components found.
#pragma once

#include <nlohmann/json.hpp>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ferry/quant/quantized_weight.h"
#include "ferry/weights/checkpoint.h"

namespace ferry::quant {

struct StoredWeights {
  // Under the parameters' names as the file spells them; StoredTensor::key is that name.
  std::vector<weights::StoredTensor> plain;
  // Parameter name ("blocks.0.to_q.weight") -> how it is stored.
  std::map<std::string, StoredQuantized> quantized;
};

// Finds the format of `checkpoint` by its metadata and keys, and joins components to weights.
// `config`: the model's "quantization_config", or null. A checkpoint of no known format comes back
// as plain tensors. Throws FormatError naming file and parameter: a component that is missing or of
// a wrong dtype or shape, a class or packing that ferry does not read.
StoredWeights read_weights(const weights::Checkpoint& checkpoint,
                           const nlohmann::ordered_json& config = nullptr);

// A format: an entry in stored_weights.cpp. `read` returns false where the checkpoint is not its
// own; several formats may share a checkpoint, each takes from `weights.plain` what belongs to it.
struct Format {
  std::string_view name;  // quantization_config's "quant_method", or ferry's word
  bool (*read)(const weights::Checkpoint& checkpoint, const nlohmann::ordered_json& config,
               StoredWeights& weights);
};
const std::vector<Format>& formats();

}  // namespace ferry::quant
