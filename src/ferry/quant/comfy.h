// ComfyUI's quantized single files, and plain files of fp8.
#pragma once

#include <map>
#include <string>

#include "ferry/quant/stored_weights.h"
#include "ferry/quant/tensor_pool.h"

namespace ferry::quant {

// Three spellings say how `<layer>.weight` is stored: the metadata "_quantization_metadata"
// ({"layers": {"<layer>": {"format": ...}}}, where the layers may lack the prefix of the keys); a
// tensor `<layer>.comfy_quant` with the same object as bytes of JSON; and, for fp8 alone, scales
// `<layer>.weight_scale` or, beside a marker `scaled_fp8`, `<layer>.scale_weight`.
//
// Formats: float8_e4m3fn, float8_e5m2 (scale: one, or one a row), nvfp4 (swizzled; high nibble
// first), mxfp8 (swizzled), int8_tensorwise without convrot, int8_blockwise. nvfp4 and mxfp8 are
// padded to multiples of 16 and 32; the padding stays. Scales of the input are not used: it stays
// as it is. A matrix `....weight` of fp8 that nothing describes is its own values.
//
// False where there is none. Throws FormatError naming file, layer and format: a format that ferry
// does not read, broken JSON, a component that is missing or not of its shape and dtype.
bool read_comfy(const std::map<std::string, std::string>& metadata, StoredWeights& weights,
                const ReadText& read_text);

// As an entry of formats().
bool read_comfy_checkpoint(const weights::Checkpoint& checkpoint,
                           const nlohmann::ordered_json& config, StoredWeights& weights);

}  // namespace ferry::quant
