#include "ferry/quant/registry.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/quant/bitsandbytes_4bit.h"
#include "ferry/quant/float8.h"
#include "ferry/quant/torchao_int4.h"
#include "ferry/quant/torchao_int8.h"
#include "ferry/tensor/dtype.h"

namespace ferry::quant {

namespace {

using Json = nlohmann::ordered_json;
using Weight = std::shared_ptr<const QuantizedWeight>;
using Shape = std::vector<int64_t>;

constexpr int64_t kInt4Group = 128, kNf4Block = 64;

Shape row_or_group(int64_t columns, int64_t group_size) {
  return {1, group_size == 0 ? columns : group_size};
}

Weight int8(Shape shape, int64_t group_size, Activation activation) {
  Shape block = row_or_group(shape[1], group_size);
  return std::make_shared<Int8Weight>(std::move(shape), std::move(block), /*has_zero_point=*/true,
                                      io::Dtype::F32, activation);
}
Weight describe_int8wo(Shape shape, at::ScalarType, int64_t group_size) {
  return int8(std::move(shape), group_size, Activation::as_is);
}
Weight describe_int8da8w(Shape shape, at::ScalarType, int64_t) {
  return int8(std::move(shape), 0, Activation::int8_per_token);
}
std::vector<at::Tensor> make_int8(const at::Tensor& weight, int64_t group_size) {
  Int8Components made = quantize_int8(weight, row_or_group(weight.size(1), group_size));
  return {made.qdata, made.scale, made.zero_point};
}

Weight float8(Shape shape, Activation activation) {
  Shape scale{shape[0], 1};
  return std::make_shared<Float8Weight>(
      std::move(shape), Float8Weight::Options{.scale_shape = scale, .activation = activation});
}
Weight describe_fp8wo(Shape shape, at::ScalarType, int64_t) {
  return float8(std::move(shape), Activation::as_is);
}
Weight describe_fp8da8w(Shape shape, at::ScalarType, int64_t) {
  return float8(std::move(shape), Activation::float8_per_token);
}
std::vector<at::Tensor> make_float8(const at::Tensor& weight, int64_t) {
  Float8Components made = quantize_float8_rows(weight);
  return {made.qdata, made.scale};
}

Weight describe_int4wo(Shape shape, at::ScalarType dtype, int64_t group_size) {
  return std::make_shared<Int4Weight>(std::move(shape), group_size == 0 ? kInt4Group : group_size,
                                      tensor::from_torch(dtype));
}
std::vector<at::Tensor> make_int4(const at::Tensor& weight, int64_t group_size) {
  Int4Components made = quantize_int4(weight, group_size == 0 ? kInt4Group : group_size);
  return {made.qdata, made.scale, made.zero_point};
}

Weight describe_nf4(Shape shape, at::ScalarType, int64_t group_size) {
  return std::make_shared<BitsAndBytes4bitWeight>(
      std::move(shape),
      BitsAndBytes4bitWeight::Options{.block_size = group_size == 0 ? kNf4Block : group_size});
}
std::vector<at::Tensor> make_nf4(const at::Tensor& weight, int64_t group_size) {
  Nf4Components made = quantize_nf4(weight, group_size == 0 ? kNf4Block : group_size);
  return {made.qdata, made.absmax, made.quant_map};
}

// --- some rows at a time ---

// Rows that begin and end with blocks of the flattened weight, whatever the columns.
int64_t rows_at_once(int64_t columns, int64_t group_size) {
  constexpr int64_t kValues = 1 << 20;
  const int64_t unit = std::max<int64_t>(kNf4Block, group_size);
  return std::max<int64_t>(1, kValues / std::max<int64_t>(1, columns) / unit) * unit;
}

// Puts a part into the whole along the dimension in which they differ, from `filled` on. Returns
// the part's extent there; what all parts share (a codebook) is simply put.
int64_t put_part(const at::Tensor& part, int64_t filled, at::Tensor& whole) {
  for (int64_t dim = 0; dim < whole.dim(); ++dim) {
    if (part.size(dim) == whole.size(dim)) continue;
    whole.narrow(dim, filled, part.size(dim)).copy_(part);
    return part.size(dim);
  }
  whole.copy_(part);
  return 0;
}

// --- quantization_config ---

Json member(const char* type, const char* value) {
  return {{"_type", type}, {"_data", value}};
}
Json versioned(const char* type, int version, Json data) {
  return {{"_type", type}, {"_version", version}, {"_data", std::move(data)}};
}
Json granularity(int64_t group_size) {
  return group_size == 0 ? versioned("PerRow", 1, {{"dim", -1}})
                         : versioned("PerGroup", 1, {{"group_size", group_size}});
}

// torchao's config class of a scheme, as its config_to_dict() writes it.
Json torchao_config(std::string_view scheme, int64_t group_size) {
  const Json e4m3 = member("torch.dtype", "float8_e4m3fn");
  if (scheme == "int8wo") {
    return versioned("Int8WeightOnlyConfig", 2,
                     {{"group_size", nullptr},
                      {"granularity", granularity(group_size)},
                      {"set_inductor_config", true}});
  }
  if (scheme == "int8da8w") {
    return versioned("Int8DynamicActivationInt8WeightConfig", 2,
                     {{"act_mapping_type", member("MappingType", "SYMMETRIC")},
                      {"weight_only_decode", false},
                      {"granularity", granularity(0)},
                      {"set_inductor_config", true},
                      {"reduce_range", false}});
  }
  if (scheme == "fp8wo") {
    return versioned(
        "Float8WeightOnlyConfig", 2,
        {{"weight_dtype", e4m3}, {"set_inductor_config", true}, {"granularity", granularity(0)}});
  }
  if (scheme == "fp8da8w") {
    return versioned(
        "Float8DynamicActivationFloat8WeightConfig", 2,
        {{"activation_dtype", e4m3},
         {"weight_dtype", e4m3},
         {"granularity", Json::array({granularity(0), granularity(0)})},
         {"packing_format", member("Float8PackingFormat", "PLAIN")},
         {"mm_config",
          versioned("Float8MMConfig", 1,
                    {{"emulate", false}, {"use_fast_accum", true}, {"pad_inner_dim", false}})},
         {"activation_value_lb", nullptr},
         {"activation_value_ub", nullptr},
         {"kernel_preference", member("KernelPreference", "AUTO")},
         {"set_inductor_config", true},
         {"alg_id", 0}});
  }
  return versioned(
      "Int4WeightOnlyConfig", 2,
      {{"group_size", group_size == 0 ? kInt4Group : group_size},
       {"set_inductor_config", true},
       {"int4_packing_format", member("Int4PackingFormat", "PLAIN")},
       {"int4_choose_qparams_algorithm", member("Int4ChooseQParamsAlgorithm", "TINYGEMM")},
       {"int4_tile_packed_ntile", 8}});
}

}  // namespace

const std::vector<Scheme>& schemes() {
  static const std::vector<Scheme> all = {
      {"int8wo", "int8 weights, a scale a row or group (TorchAO)", "torchao", 0, true,
       describe_int8wo, make_int8},
      {"int8da8w", "int8 weights, inputs quantized to int8 as they come (TorchAO)", "torchao", 0,
       false, describe_int8da8w, make_int8},
      {"fp8wo", "float8 weights, a scale a row (TorchAO)", "torchao", 0, false, describe_fp8wo,
       make_float8},
      {"fp8da8w", "float8 weights, inputs quantized to float8 as they come (TorchAO)", "torchao", 0,
       false, describe_fp8da8w, make_float8},
      {"int4wo", "4-bit weights in groups of a row (TorchAO)", "torchao", kInt4Group, true,
       describe_int4wo, make_int4},
      {"nf4", "4-bit NormalFloat weights in blocks (bitsandbytes)", "bitsandbytes", kNf4Block, true,
       describe_nf4, make_nf4},
  };
  return all;
}

const Scheme& find_scheme(std::string_view name) {
  std::string known;
  for (const Scheme& scheme : schemes()) {
    if (scheme.name == name) return scheme;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", scheme.name);
  }
  throw_error<ArgumentError>("unknown quantization scheme \"{}\"; there are {}", name, known);
}

Quantized quantize(const Scheme& scheme, const at::Tensor& weight, int64_t group_size) {
  const at::ScalarType dtype = weight.scalar_type();
  if (weight.dim() != 2 || weight.numel() == 0 ||
      (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)) {
    throw_error<ArgumentError>(
        "{}: got a weight of {} dimensions and {}, expected a matrix of "
        "float32, bfloat16 or float16",
        scheme.name, weight.dim(), tensor::dtype_name(dtype));
  }
  if (group_size < 0 || (group_size != 0 && !scheme.takes_group_size)) {
    throw_error<ArgumentError>("{}: got groups of {}, and it {}", scheme.name, group_size,
                               scheme.takes_group_size ? "takes positive ones" : "takes none");
  }
  Quantized made{scheme.describe(weight.sizes().vec(), dtype, group_size), {}};
  for (const Component& component : made.weight->components())
    made.components.push_back(at::empty(component.shape, tensor::to_torch(component.dtype)));
  const int64_t step = rows_at_once(weight.size(1), group_size);
  std::vector<int64_t> filled(made.components.size());
  for (int64_t row = 0; row < weight.size(0); row += step) {
    const int64_t count = std::min(step, weight.size(0) - row);
    std::vector<at::Tensor> part = scheme.quantize(weight.narrow(0, row, count), group_size);
    for (size_t i = 0; i < part.size(); ++i)
      filled[i] += put_part(part[i], filled[i], made.components[i]);
  }
  return made;
}

Json quantization_config(const Scheme& scheme, int64_t group_size,
                         const std::vector<std::string>& skipped, at::ScalarType compute_dtype) {
  const Json modules = skipped.empty() ? Json(nullptr) : Json(skipped);
  if (scheme.quant_method == "torchao") {
    return {{"quant_method", "torchao"},
            {"quant_type", {{"default", torchao_config(scheme.name, group_size)}}},
            {"modules_to_not_convert", modules}};
  }
  return {{"quant_method", "bitsandbytes"},
          {"_load_in_8bit", false},
          {"_load_in_4bit", true},
          {"llm_int8_threshold", 6.0},
          {"llm_int8_skip_modules", modules},
          {"llm_int8_enable_fp32_cpu_offload", false},
          {"llm_int8_has_fp16_weight", false},
          {"bnb_4bit_quant_type", "nf4"},
          {"bnb_4bit_use_double_quant", false},
          {"bnb_4bit_compute_dtype", tensor::dtype_name(compute_dtype)},
          {"bnb_4bit_quant_storage", "uint8"},
          {"load_in_4bit", true},
          {"load_in_8bit", false}};
}

}  // namespace ferry::quant
