// The schemes that ferry quantizes to, by the names of `ferry quantize`: an entry each in
// registry.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

// Pure functions; thread-safe.
struct Scheme {
  std::string_view name;     // "int8wo"
  std::string_view summary;  // for help: a line
  // Columns that share a scale where the user names none; 0: the scheme has no groups.
  int64_t group_size;
  // How a weight [out, in] of `dtype` will be held; null where its shape does not fit the scheme (a
  // row that is no multiple of the group).
  std::shared_ptr<const QuantizedWeight> (*describe)(at::IntArrayRef shape, at::ScalarType dtype,
                                                     int64_t group_size);
  // The components, on the CPU, of a weight of that shape: float32, bfloat16 or float16.
  std::vector<at::Tensor> (*quantize)(const at::Tensor& weight, const QuantizedWeight& description);
  // config.json's "quantization_config", as diffusers writes it.
  nlohmann::ordered_json (*config)(int64_t group_size, const std::vector<std::string>& skipped);
};

const std::vector<Scheme>& schemes();
// Throws ArgumentError that names those there are.
const Scheme& find_scheme(std::string_view name);

}  // namespace ferry::quant
