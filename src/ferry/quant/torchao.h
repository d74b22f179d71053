// TorchAO in safetensors (torchao/prototype/safetensors): the metadata that says which tensors make
// which weight.
#pragma once

#include <map>
#include <string>

#include "ferry/quant/stored_weights.h"

namespace ferry::quant {

// Weight `blocks.0.to_q.weight` of a class with inner tensors qdata, scale, ... is stored as
// `blocks.0.to_q._weight_qdata`, `blocks.0.to_q._weight_scale`, ...; plain tensors keep their name.
// `__metadata__` has, as strings of JSON, the list "tensor_names" and an entry a name:
// {"_type": "Tensor"}, or {"_type": class, "_data": attributes, "_tensor_data_names": [...]}.
//
// Read: Float8Tensor, Int8Tensor, Int4Tensor, Int4TilePackedTo4dTensor, IntxUnpackedToInt8Tensor,
// NVFP4Tensor, MXTensor (float8 and float4 elements). Where a class has the input quantized in a
// way that ferry has no kernel for (Intx, NVFP4, MX; float8 by groups or blocks), it stays as it
// is.

// False where `metadata` is not TorchAO's. Entries decide, not the list, so that the metadata of
// shards may be merged from several lists; a weight's tensors may lie in different shards. Throws
// FormatError naming file and parameter: broken JSON, a class or an attribute that ferry does not
// read, a name without an entry, a component that is missing or not of its shape and dtype.
bool read_torchao(const std::map<std::string, std::string>& metadata, StoredWeights& weights);

// As an entry of formats().
bool read_torchao_checkpoint(const weights::Checkpoint& checkpoint,
                             const nlohmann::ordered_json& config, StoredWeights& weights);

}  // namespace ferry::quant
