// bitsandbytes in safetensors, as diffusers and transformers save it.
#pragma once

#include "ferry/quant/stored_weights.h"
#include "ferry/quant/tensor_pool.h"

namespace ferry::quant {

// 4-bit, of layer m: `m.weight` (qdata), `m.weight.absmax`, `m.weight.quant_map`,
// `m.weight.nested_absmax`, `m.weight.nested_quant_map`, and
// `m.weight.quant_state.bitsandbytes__nf4` (or __fp4), the bytes of a JSON object. int8:
// `m.weight`, `m.SCB`, and optionally `m.weight_format`, 0: rows.
//
// False where there is no such weight. `read_text` reads the small tensors that describe others.
// Throws FormatError naming file and parameter: broken JSON, a component that is missing or not of
// its shape and dtype, another weight format.
bool read_bitsandbytes(StoredWeights& weights, const ReadText& read_text);

// As an entry of formats().
bool read_bitsandbytes_checkpoint(const weights::Checkpoint& checkpoint,
                                  const nlohmann::ordered_json& config, StoredWeights& weights);

}  // namespace ferry::quant
