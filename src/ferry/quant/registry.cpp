#include "ferry/quant/registry.h"

#include <fmt/ranges.h>

#include "ferry/base/error.h"
#include "ferry/quant/torchao_int8.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {

namespace {

using Json = nlohmann::ordered_json;

Json torchao_config(const char* type, Json data, const std::vector<std::string>& skipped) {
  Json config = {{"quant_method", "torchao"},
                 {"quant_type",
                  {{"default", {{"_type", type}, {"_version", 2}, {"_data", std::move(data)}}}}}};
  config["modules_to_not_convert"] = skipped.empty() ? Json(nullptr) : Json(skipped);
  return config;
}

Json per_row() {
  return {{"_type", "PerRow"}, {"_version", 1}, {"_data", {{"dim", -1}}}};
}

// ---- int8 ----

std::shared_ptr<const QuantizedWeight> int8(at::IntArrayRef shape, int64_t group_size,
                                            Activation activation) {
  if (group_size > 0 && shape[1] % group_size != 0) return nullptr;
  return std::make_shared<Int8Weight>(
      shape.vec(), std::vector<int64_t>{1, group_size > 0 ? group_size : shape[1]},
      /*has_zero_point=*/true, io::Dtype::F32, activation);
}

std::shared_ptr<const QuantizedWeight> int8_weight_only(at::IntArrayRef shape, at::ScalarType,
                                                        int64_t group_size) {
  return int8(shape, group_size, Activation::as_is);
}

std::shared_ptr<const QuantizedWeight> int8_dynamic(at::IntArrayRef shape, at::ScalarType,
                                                    int64_t group_size) {
  return int8(shape, group_size, Activation::int8_per_token);
}

std::vector<at::Tensor> to_int8(const at::Tensor& weight, const QuantizedWeight& description) {
  auto parts = quantize_int8(weight, dynamic_cast<const Int8Weight&>(description).block_size());
  return {parts.qdata, parts.scale, parts.zero_point};
}

Json int8_weight_only_config(int64_t, const std::vector<std::string>& skipped) {
  return torchao_config(
      "Int8WeightOnlyConfig",
      {{"group_size", nullptr}, {"granularity", per_row()}, {"set_inductor_config", true}},
      skipped);
}

Json int8_dynamic_config(int64_t, const std::vector<std::string>& skipped) {
  return torchao_config("Int8DynamicActivationInt8WeightConfig",
                        {{"granularity", per_row()}, {"set_inductor_config", true}}, skipped);
}

}  // namespace

const std::vector<Scheme>& schemes() {
  static const std::vector<Scheme> all = {
      {"int8wo", "int8 weights, a scale a row (TorchAO)", 0, int8_weight_only, to_int8,
       int8_weight_only_config},
      {"int8da8w", "int8 weights, and activations quantized as they come (TorchAO)", 0,
       int8_dynamic, to_int8, int8_dynamic_config},
  };
  return all;
}

const Scheme& find_scheme(std::string_view name) {
  std::vector<std::string_view> known;
  for (const Scheme& scheme : schemes()) {
    if (scheme.name == name) return scheme;
    known.push_back(scheme.name);
  }
  throw_error<ArgumentError>("scheme: got '{}', expected one of {}", name, fmt::join(known, ", "));
}

}  // namespace ferry::quant
