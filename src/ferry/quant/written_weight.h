// How quantized weights are written, so that torchao, bitsandbytes and diffusers load them.
#pragma once

#include <c10/core/ScalarType.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// One tensor of a written weight: a component, or bytes that describe the others.
struct WrittenTensor {
  std::string key;
  io::Dtype dtype = io::Dtype::U8;
  std::vector<int64_t> shape;
  std::optional<size_t> component = {};  // of QuantizedWeight::components(); nothing: `bytes`
  std::string bytes = {};
};

struct WrittenWeight {
  std::vector<WrittenTensor> tensors;
  std::string metadata;  // TorchAO's entry, JSON; empty where the format has none
};

// dtype: of the weight that was quantized, which Python computes in. Written are the classes that
// ferry quantizes to: int8, float8 by rows, groups or tensor, and int4 as TorchAO's, nf4 and fp4
// without nesting as bitsandbytes'. Throws ArgumentError for another one.
WrittenWeight written_weight(const std::string& parameter, const QuantizedWeight& weight,
                             at::ScalarType dtype);

// The metadata of a file (of each shard) with TorchAO's weights: of each parameter the name and
// WrittenWeight::metadata, which is empty for a plain tensor.
std::map<std::string, std::string> torchao_metadata(
    const std::vector<std::pair<std::string, std::string>>& entries);

}  // namespace ferry::quant
