// The schemes that ferry quantizes to, by name.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/quant/quantized_weight.h"

namespace ferry::quant {

struct Scheme {
  std::string_view name;          // "int8wo": what `--scheme` takes
  std::string_view description;   // for help and reports
  std::string_view quant_method;  // of quantization_config: "torchao" or "bitsandbytes"
  // Columns (nf4: values of the flattened weight) that share a scale, where none is asked for; 0:
  // the row.
  int64_t default_group_size = 0;
  bool takes_group_size = false;
  // What a weight of shape [out, in] and dtype becomes; group_size 0: the default. Throws
  // ArgumentError for a shape that the scheme cannot hold, which is then better left as it is.
  std::shared_ptr<const QuantizedWeight> (*describe)(std::vector<int64_t> shape,
                                                     at::ScalarType dtype, int64_t group_size);
  // The components of describe()'s weight. weight: [out, in], float32, bfloat16 or float16, on the
  // CPU.
  std::vector<at::Tensor> (*quantize)(const at::Tensor& weight, int64_t group_size);
};

// int8wo, int8da8w, fp8wo, fp8da8w, int4wo, nf4.
const std::vector<Scheme>& schemes();
// Throws ArgumentError listing what there is.
const Scheme& find_scheme(std::string_view name);

struct Quantized {
  std::shared_ptr<const QuantizedWeight> weight;
  std::vector<at::Tensor> components;
};
// A few rows at a time, so that what is needed beside weight and components is a few dozen MiB.
// Throws ArgumentError: a weight that is no matrix or of another dtype, a group size that the
// scheme does not take or that does not divide the weight.
Quantized quantize(const Scheme& scheme, const at::Tensor& weight, int64_t group_size = 0);

// config.json's "quantization_config" as diffusers' TorchAoConfig and BitsAndBytesConfig write it.
// skipped: names of modules that were left as they are. compute_dtype: bitsandbytes' only.
nlohmann::ordered_json quantization_config(const Scheme& scheme, int64_t group_size,
                                           const std::vector<std::string>& skipped,
                                           at::ScalarType compute_dtype);

}  // namespace ferry::quant
